"""Rows, what makes a batch of them, and a sample drawn of them."""

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from mashup_callback.scoring import draw_sample


DATA = [{"input_ids": [i]} for i in range(100)]


def padded(rows):
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], True, -100 if name == "labels" else 0)
        for name in rows[0]
    }


def drawn(data, size, batch_size=2, collate=padded, **settings):
    return draw_sample(DataLoader(data, collate_fn=collate), size, batch_size=batch_size, **settings)


def numbers(rows):
    return [row["input_ids"][0] for row in rows.rows]
