"""AlexNet as a PyTorch user writes it: eager, or `torch.compile`d; float32, or under bfloat16 autocast."""

import torch
from torch import nn
from torch.nn import functional as F
from turns import Asked, Opened, serve


class Norm(nn.Module):
    """Local response normalisation within each of the two towers, by PyTorch's own function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        towers = F.local_response_norm(x.reshape(2 * n, channels // 2, height, width), 5, 5e-4, 0.75, 2.0)
        return towers.reshape(x.shape)


def paper2012() -> nn.Sequential:
    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        *(nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), Norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), Norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        nn.Flatten(),
        *(nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(4096, 1000),
    )


def torchvision() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        nn.AdaptiveAvgPool2d((6, 6)),
        nn.Flatten(),
        *(nn.Dropout(0.5), nn.Linear(9216, 4096), nn.ReLU(inplace=True)),
        *(nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
        nn.Linear(4096, 1000),
    )


NETWORKS = {"paper2012": paper2012, "torchvision": torchvision}


def load(asked: Asked) -> nn.Sequential:
    """The network with the weights asked for, layer by layer in their order."""
    model = NETWORKS[asked.preset]()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), asked.weights.values(), strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


def open_(asked: Asked) -> Opened:
    device = asked.options["device"]
    model = load(asked).to(device)
    images, labels = torch.from_numpy(asked.images).to(device), torch.from_numpy(asked.labels).to(device)
    run = torch.compile(model) if asked.options.get("compile") else model
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=asked.precision == "bfloat16")

    def infer(count: int) -> torch.Tensor:
        with torch.inference_mode(), autocast():
            for _ in range(count):
                logits = run(images)
        wait()
        return logits

    model.eval()
    logits = infer(1).float().cpu().numpy()
    if asked.mode == "infer":
        return Opened(logits=logits, steps=infer)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12, momentum=0.9, weight_decay=5e-4)

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            with autocast():
                loss = F.cross_entropy(run(images), labels)
            loss.backward()
            optimizer.step()
        wait()

    return Opened(logits=logits, steps=train)


if __name__ == "__main__":
    serve(open_)
