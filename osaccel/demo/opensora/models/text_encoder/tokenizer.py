# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of whole words; 0 pads, 1 ends every text, 2 stands for an unknown word."""

import json
import os
import re

import torch


class Encoding(dict):
    """`input_ids` and `attention_mask`, by key or by attribute."""

    __getattr__ = dict.__getitem__


class WordTokenizer:
    PAD, END, UNKNOWN = 0, 1, 2

    def __init__(self, words):
        self.words = list(words)
        self.ids = {word: index + 3 for index, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words) + 3

    def __call__(
        self, text, padding=False, max_length=None, truncation=False, return_tensors=None, add_special_tokens=True,
        return_attention_mask=True,
    ):  # fmt: skip
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._encode(entry, add_special_tokens) for entry in texts]
        if truncation and max_length:
            rows = [row if len(row) <= max_length else row[: max_length - 1] + [self.END] for row in rows]
        length = max_length if padding == "max_length" else max(len(row) for row in rows)
        ids = [row + [self.PAD] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        if return_tensors == "pt":
            ids, mask = torch.tensor(ids), torch.tensor(mask)
        return Encoding(input_ids=ids, attention_mask=mask)

    def _encode(self, text, end):
        ids = [self.ids.get(word, self.UNKNOWN) for word in re.findall(r"[a-z]+", text.lower())]
        return ids + [self.END] if end else ids

    def batch_decode(self, rows, skip_special_tokens=True):
        names = {index: word for word, index in self.ids.items()}
        names.update({} if skip_special_tokens else {self.PAD: "<pad>", self.END: "</s>", self.UNKNOWN: "<unk>"})
        return [" ".join(names[int(index)] for index in row if int(index) in names) for row in rows]

    def save_pretrained(self, folder):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "vocabulary.json"), "w") as file:
            json.dump(self.words, file)

    @classmethod
    def from_pretrained(cls, folder, cache_dir=None):
        with open(os.path.join(folder, "vocabulary.json")) as file:
            return cls(json.load(file))
