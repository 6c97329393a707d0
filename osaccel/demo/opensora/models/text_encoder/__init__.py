# SPDX-License-Identifier: Apache-2.0
"""The small text encoder and its word tokenizer, called like their Hugging Face relatives."""

from .modeling_text import TextEncoder
from .tokenizer import WordTokenizer

__all__ = ["TextEncoder", "WordTokenizer"]
