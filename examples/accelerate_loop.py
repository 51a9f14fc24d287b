#!/usr/bin/env python
"""
A plain Accelerate training loop, without the Trainer, in which the shuffle is two lines (marked WASH below).

    torchrun --nproc-per-node 2 examples/accelerate_loop.py
    accelerate launch --config_file examples/accelerate_configs/two_cpu_processes.yaml examples/accelerate_loop.py
    accelerate launch --config_file examples/accelerate_configs/one_member_per_gpu.yaml examples/accelerate_loop.py

Each process trains one member of the population on scikit-learn's digits, on a GPU of its own or, where there is none
or with `--use_cpu`, on the CPU. At the end the members are averaged: the soup is the model to ship.
"""

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, reduce
from sklearn.datasets import load_digits
from torch import nn

from hf_wash.mixing import WashMixer


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    return 100 * (model(images).argmax(dim=1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--probability", type=float, default=0.05, help="p: what counts is p times the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    args = parser.parse_args()

    # Unless it is told to use the CPU, accelerate (1.15) does not see that processes without a GPU belong together.
    accelerator = Accelerator(cpu=args.use_cpu or not torch.accelerator.is_available())
    if accelerator.num_processes == 1:
        print(
            "One process trains one member, which has nobody to exchange weights with: this is a plain run. For a "
            "population: torchrun --nproc-per-node 2 examples/accelerate_loop.py"
        )
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    shuffled = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(labels)))
    train, test = shuffled[:1400], shuffled[1400:]
    test_images, test_labels = images[test].to(accelerator.device), labels[test].to(accelerator.device)

    # All members start from the same weights. Without DDP nothing sees to that but us.
    model = build_model().to(accelerator.device)
    for parameter in model.parameters():
        broadcast(parameter.data, from_process=0)
    # evaluation_mode=True leaves the model without DistributedDataParallel, which would average the gradients and so
    # make one model of all members.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(
        torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9, nesterov=True)
    )
    # Not prepared: a prepared data loader would give each process its share of the data, where every member is to see
    # all of it in an order of its own, and a prepared scheduler would step once for every process.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, args.num_steps)
    order = torch.Generator().manual_seed(args.seed + accelerator.process_index)

    mixer = WashMixer(model, optimizer, probability=args.probability, seed=args.seed)  # WASH, the first line

    moved = sent = 0
    model.train()
    for step in range(args.num_steps):
        batch = train[torch.randint(len(train), (args.batch_size,), generator=order)]
        logits = model(images[batch].to(accelerator.device))
        loss = nn.functional.cross_entropy(logits, labels[batch].to(accelerator.device))
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        stats = mixer.mix(step)  # WASH, the second line
        moved, sent = moved + stats.values_moved, sent + stats.bytes_sent
    mixer.synchronize()

    members = gather_object([accuracy(model, test_images, test_labels)])
    # This model has no buffers. With BatchNorm, re-estimate the soup's statistics (hf_wash.recalibrate_batch_norm).
    distance = torch.zeros((), device=accelerator.device)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = reduce(parameter, reduction="mean")
            distance += (parameter - mean).square().sum()
            parameter.copy_(mean)
    distance = reduce(distance, reduction="mean").sqrt().item()  # the consensus distance
    soup = accuracy(model, test_images, test_labels)
    accelerator.print(f"members: {', '.join(f'{value:.1f} %' for value in members)}; soup: {soup:.1f} %")
    accelerator.print(f"members' distance from their mean: {distance:.3f}")
    copies = moved / sum(parameter.numel() for parameter in model.parameters())
    accelerator.print(f"received by member 0: {moved:,} values ({copies:.2f} models); sent: {sent:,} bytes")
    accelerator.end_training()


if __name__ == "__main__":
    main()
