"""The package beside the authors' own, `momo-opt`, in one loop: same weights, same batches, point by point.

    python scripts/compare_with_authors.py --dataset FOLDER_OF_MNIST

In float64, because in float32 two roundings of one method drift apart over hundreds of steps. The MLP 784-100-100-10 at
batch 128 and constant lr; `demo` takes scikit-learn's digits. It prints a table of the
validation accuracy of both packages for every method and learning rate, and the largest difference between them.
"""

import argparse


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import momo as authors
import torch
from tqdm.auto import tqdm

from momo_hf import Momo, MomoAdam
from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import run_main
from momo_hf.recipes.images.data import load_images
from momo_hf.recipes.images.models import MLPConfig, MLPForImageClassification
from momo_hf.recipes.images.transforms import ImageTransform


METHODS = {"momo": (Momo, authors.Momo), "momo_adam": (MomoAdam, authors.MomoAdam)}
LEARNING_RATES = {"momo": (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0), "momo_adam": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)}


def tensors(dataset: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    data = load_images(dataset)
    size = data["train"][0]["image"].width
    transform = ImageTransform(size, 1, mean=0.1307, std=0.3081)
    return {
        split: (torch.stack([transform(image) for image in rows["image"]]).double(), torch.tensor(rows["label"][:]))
        for split, rows in data.items()
    }


def train(optimizer_class: type, lr: float, seed: int, data: dict, epochs: int, batch: int) -> float:
    """One run; returns the validation accuracy after the last epoch."""
    torch.manual_seed(seed)
    (images, labels), (eval_images, eval_labels) = data["train"], data["validation"]
    model = MLPForImageClassification(MLPConfig(image_size=images.shape[-1], num_channels=1, num_labels=10))
    optimizer = optimizer_class(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            loss = model(images[rows], labels[rows]).loss
            loss.backward()
            optimizer.step(loss=loss.detach())
    model.eval()
    with torch.no_grad():
        return (model(eval_images).logits.argmax(1) == eval_labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="demo", help="`demo`, a folder of idx files, or a Hub name")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    data = tensors(args.dataset)
    points = [(method, lr) for method, lrs in LEARNING_RATES.items() for lr in lrs]
    worst = 0.0
    rows = []
    for method, lr in tqdm(points, unit="point"):
        ours, theirs = (
            [train(cls, lr, seed, data, args.epochs, args.batch) for seed in args.seeds] for cls in METHODS[method]
        )
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, theirs)))
        rows.append((method, lr, sum(ours) / len(ours), sum(theirs) / len(theirs)))
    print("| method | lr | momo_hf | momo-opt |\n|---|---|---|---|")
    for method, lr, ours, theirs in rows:
        print(f"| {method} | {lr:g} | {ours:.4f} | {theirs:.4f} |")
    print(f"\nLargest difference of a run: {worst:.4f} of {len(data['validation'][1])} images.")


if __name__ == "__main__":
    end(run_main(main))
