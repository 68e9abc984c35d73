"""megatron-core's GPTDataset over a shard that nlm wrote: each sample is consecutive tokens of the shard."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from nlm.data import TokenShard, load_tokenizer
from nlm.data.tokenize import tokenize

SEQ_LEN = 1000


@pytest.fixture(scope="session")
def twelve(plays: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve plays: as many documents, of which GPTDataset's split gives 6, 3 and 3."""
    prefix = str(tmp_path_factory.mktemp("gptdataset") / "plays")
    tokenize([str(play) for play in plays[:12]], prefix, tokenizer="byte", train_tokenizer=None)
    return prefix


def config(prefix: str, cache: Path) -> GPTDatasetConfig:
    byte = load_tokenizer("byte")
    # All that it asks of a tokenizer: no `pad`, so nothing is taken for padding; `unique_identifiers` name the cache.
    tokenizer = SimpleNamespace(vocab_size=byte.vocab_size, eod=byte.eod, unique_identifiers={"class": "byte"})
    return GPTDatasetConfig(
        random_seed=5,
        sequence_length=SEQ_LEN,
        blend=([prefix], None),
        split="50,25,25",
        path_to_cache=str(cache),
        tokenizer=tokenizer,  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )


def test_gptdataset_reads_consecutive_tokens_of_our_documents(twelve: str, tmp_path: Path) -> None:
    epochs = 2.2  # so that document boundaries, epoch boundaries and both shuffles are crossed
    ours = TokenShard(twelve)
    lengths = [len(ours.document(i)) for i in range(ours.n_documents)]
    wanted = [int(epochs * sum(lengths[part]) / SEQ_LEN) for part in (slice(6), slice(6, 9), slice(9, 12))]
    built = BlendedMegatronDatasetBuilder(
        GPTDataset, wanted, is_built_on_rank=lambda: True, config=config(twelve, tmp_path)
    ).build()
    for split, dataset, documents, n_samples in zip(
        Split, built, (range(6), range(6, 9), range(9, 12)), wanted, strict=True
    ):
        assert dataset.index_split is split and len(dataset) >= n_samples
        order = dataset.document_index.tolist()
        n_epochs, rest = divmod(len(order), len(documents))
        assert (n_epochs, rest) == (3, 0)
        assert sorted(order) == sorted([*documents] * n_epochs)
        stream = np.concatenate([ours.document(i) for i in order])
        assert len(dataset) == (len(stream) - 1) // SEQ_LEN
        starts = dataset.shuffle_index.astype(int) * SEQ_LEN
        assert sorted(starts) == list(range(0, SEQ_LEN * len(dataset), SEQ_LEN))  # every sample once
        for i, start in enumerate(starts):
            sample = dataset[i]
            np.testing.assert_array_equal(sample["tokens"], stream[start : start + SEQ_LEN])
            np.testing.assert_array_equal(sample["labels"], stream[start + 1 : start + SEQ_LEN + 1])
            np.testing.assert_array_equal(sample["loss_mask"], sample["tokens"] != 256)  # eod_mask_loss
            np.testing.assert_array_equal(sample["position_ids"], np.arange(SEQ_LEN))
    description = json.loads(next(tmp_path.glob("*-train-description.txt")).read_text())
    assert description["dataset_path"] == twelve
