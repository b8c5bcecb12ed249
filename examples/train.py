"""Train AlexNet on handwritten digits, and save it."""

import argparse

import portnet

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--backend", default="auto", help="a name that 'portnet backends' lists")
parser.add_argument("--steps", type=int, default=210)
parser.add_argument("--image-size", type=int, default=99, help="pixels a side; AlexNet's own is 227")
parser.add_argument("--weights", default="digits.safetensors", help="where to save")
options = parser.parse_args()

data = portnet.load_data("digits")
# With paper2012's biases of 1 the loss on ten digits stays flat for hundreds of steps; with caffe's 0.1 it moves.
net = portnet.AlexNet(
    options.backend, "caffe", classes=len(data.train.class_names), image_size=options.image_size, mean=data.train.mean
)
print(net)


def report(step: int, loss: float) -> None:
    if step == 1 or step % 30 == 0:
        print(f"step {step}: loss {loss:.3f}")


net.fit(data, steps=options.steps, batch=64, on_step=report)
result = net.evaluate(data)
print(f"test: {result.top1:.1%} of {result.count} digits are right")
print("weights:", net.save(options.weights))
