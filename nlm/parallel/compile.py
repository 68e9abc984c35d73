"""Compiling block by block: one graph serves every layer, so compile time does not grow with depth."""

from nlm.model import Transformer


def compile_blocks(model: Transformer) -> None:
    for block in model.blocks.values():
        block.compile(fullgraph=True, dynamic=False)
