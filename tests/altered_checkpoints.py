"""Checkpoints altered on purpose: bits that flip with and without the manifest's knowledge."""

import hashlib
import json

import torch
from safetensors.torch import load_file, save_file

from hf_wash.trainer import manifest


def fingerprint(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def change(checkpoint, name, edit):
    """Change a file of a checkpoint as somebody would who makes the manifest say so."""
    edit(checkpoint / name)
    path = checkpoint / "population.json"
    content = json.loads(path.read_text())
    content["files"][name] = manifest.file_record(checkpoint / name)
    path.write_text(json.dumps(manifest.seal(content)))


def flip_bit(tensor, at):
    tensor.view(-1).view(torch.uint8)[at] ^= 1


def flip_weight(path):
    tensors = load_file(path)
    flip_bit(tensors["vit.layernorm.weight"], 5)
    save_file(tensors, path, metadata={"format": "pt"})


def flip_moment(path):
    training = torch.load(path, weights_only=True)
    flip_bit(training["state"]["classifier.bias"]["exp_avg_sq"], 8)
    torch.save(training, path)


def other_rate(path):
    training = torch.load(path, weights_only=True)
    training["scheduler"]["_last_lr"][0] *= 1.5
    torch.save(training, path)


def flip_stream(path):
    streams = json.loads(path.read_text())
    words = streams["dict"]["streams"]["dict"]["python"]["tuple"][1]["tuple"]
    words[7] ^= 1
    path.write_text(json.dumps(streams))


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def flip_outer_momentum(path):
    state = torch.load(path, weights_only=True)
    held = [state]
    while not isinstance(held[-1], torch.Tensor):
        inner = held[-1].values() if isinstance(held[-1], dict) else held[-1]
        held.append(next(value for value in inner if isinstance(value, (torch.Tensor, dict, list, tuple))))
    flip_bit(held[-1], 0)
    torch.save(state, path)
