"""Classify pictures, or the first test digits, with the weights that train.py saved."""

import argparse

import portnet

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pictures", nargs="*", help="files of any size and kind; the first ten test digits by default")
parser.add_argument("--backend", default="auto", help="a name that 'portnet backends' lists")
parser.add_argument("--weights", default="digits.safetensors")
options = parser.parse_args()

net = portnet.AlexNet.load(options.weights, options.backend)
print(net)

for path in options.pictures:
    print(f"{path}:", ", ".join(f"{name} {share:.1%}" for name, share in net.classify(path, top=3)))

if not options.pictures:
    test = portnet.load_data("digits").test
    # What classify does for one picture, here for a batch: prepare, infer, take the largest logit.
    logits = net(portnet.preprocess([test.read(i) for i in range(10)], net.graph, whole=test.whole))
    print("labels: ", *test.labels[:10])
    print("answers:", *logits.argmax(axis=1))
