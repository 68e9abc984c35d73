"""A text to copy: `python tools/copies.py --out data/copies` writes pairs of four random words and the same four, as
train.tsv and validation.tsv, and tokenizer.json with a token a word, for `nlm tokenize --languages source,copy`.

No word tells of another. So a decoder that reads nothing of the source can know the end of a copy at best, and its loss
is no less than FLOOR; who is below that has heard from the encoder.
"""

import argparse
import random
from math import log
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

WORDS = "abcdefghijklmnop"
LENGTH = 4
PAIRS = {"train": 100_000, "validation": 1000}
FLOOR = LENGTH * log(len(WORDS)) / (LENGTH + 1)
"""In nats a token, of which the last of five is the end."""


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, n) in enumerate(PAIRS.items()):
        draw = random.Random(seed)
        texts = (" ".join(draw.choices(WORDS, k=LENGTH)) for _ in range(n))
        folder.joinpath(f"{name}.tsv").write_text("source\tcopy\n" + "".join(f"{text}\t{text}\n" for text in texts))
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<2source>", "<2copy>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
