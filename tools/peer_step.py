"""A step of training in one of the libraries that tools/peers.py compares, run by the Python of its own environment.

`python peer_step.py NAME SHAPE`, SHAPE as JSON, answers each number of steps on stdin with a line of JSON: seconds of
the CPU and of the clock a step, the process's peak memory so far, and the number of parameters. The same work for all:
forward, mean cross-entropy in float32, backward, clipping to norm 1, AdamW.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Shape = dict[str, Any]
"""n_layers, dim, n_heads, ffn_dim, vocab_size, rows, seq_len, threads, precision ("fp32", "bf16"), how ("eager",
"compiled" block by block, "compiled whole", "checkpointed" block by block; nlm's "compiled, sqrt"), and model, keys of
nlm's [model]."""
Logits = Callable[[Tensor], Tensor]
"""Tokens [B S] -> [B S V]."""


def transformers(s: Shape) -> tuple[nn.Module, Logits]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=s["vocab_size"],
            hidden_size=s["dim"],
            num_hidden_layers=s["n_layers"],
            num_attention_heads=s["n_heads"],
            num_key_value_heads=s["n_heads"],
            intermediate_size=s["ffn_dim"],
            max_position_embeddings=s["seq_len"],
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    return model, lambda tokens: model(input_ids=tokens).logits


def litgpt(s: Shape) -> tuple[nn.Module, Logits]:
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=s["seq_len"],
            n_layer=s["n_layers"],
            n_embd=s["dim"],
            n_head=s["n_heads"],
            padded_vocab_size=s["vocab_size"],
            vocab_size=s["vocab_size"],
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=s["ffn_dim"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
        )
    )
    return model, model


def olmo_core(s: Shape) -> tuple[nn.Module, Logits]:
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerConfig

    model = TransformerConfig.llama_like(
        d_model=s["dim"],
        n_layers=s["n_layers"],
        n_heads=s["n_heads"],
        vocab_size=s["vocab_size"],
        feed_forward=FeedForwardConfig(hidden_size=s["ffn_dim"], bias=False),
        attn_backend=AttentionBackendName.torch,
    ).build(init_device="cpu")
    model.init_weights(max_seq_len=s["seq_len"], device=torch.device("cpu"))
    return model, model


def torchtitan(s: Shape) -> tuple[nn.Module, Logits]:
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import (
        _EMBEDDING_INIT,
        _NORM_INIT,
        Llama3Model,
        _build_llama3_layers,
        _output_linear_init,
    )

    # Its language models have FlexAttention, which has no backward on a CPU; of its other models, this.
    llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()
    dim = s["dim"]
    config = Llama3Model.Config(
        dim=dim,
        vocab_size=s["vocab_size"],
        tok_embeddings=Embedding.Config(num_embeddings=s["vocab_size"], embedding_dim=dim, param_init=_EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=s["vocab_size"], param_init=_output_linear_init(dim)),
        layers=_build_llama3_layers(
            fuse_qkv=True,
            n_layers=s["n_layers"],
            dim=dim,
            n_heads=s["n_heads"],
            hidden_dim=s["ffn_dim"],
            rope=ComplexRoPE.Config(dim=dim // s["n_heads"], max_seq_len=s["seq_len"], theta=10000),
            attn_backend="flex",
        ),
    )
    model = config.build()
    model.init_states()
    positions = torch.arange(s["seq_len"])[None].expand(s["rows"], -1)
    return model, lambda tokens: model(tokens, positions=positions)


def torchscale(s: Shape) -> tuple[nn.Module, Logits]:
    # It imports timm, and that torchvision, which defines fakes of operators that its build for GPUs alone has.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    from torchscale.architecture.config import DecoderConfig
    from torchscale.architecture.decoder import Decoder
    from torchscale.component.embedding import PositionalEmbedding, TextEmbedding

    config = DecoderConfig(
        decoder_embed_dim=s["dim"],
        decoder_attention_heads=s["n_heads"],
        decoder_ffn_embed_dim=s["ffn_dim"],
        decoder_layers=s["n_layers"],
        activation_fn="relu",
        deepnorm=True,
        vocab_size=s["vocab_size"],
    )
    model = Decoder(
        config,
        embed_tokens=TextEmbedding(s["vocab_size"], s["dim"]),
        embed_positions=PositionalEmbedding(s["seq_len"] + 2, s["dim"]),
        output_projection=nn.Linear(s["dim"], s["vocab_size"], bias=False),
    )
    return model, lambda tokens: model(tokens)[0]


def ngpt_pytorch(s: Shape) -> tuple[nn.Module, Logits]:
    from nGPT_pytorch import nGPT

    for layer in vars(
        sys.modules[nGPT.__module__]
    ).values():  # some say when two are equal, but have no hash, which torch wants
        if isinstance(layer, type) and issubclass(layer, nn.Module) and layer.__hash__ is None:
            layer.__hash__ = nn.Module.__hash__
    model = nGPT(
        num_tokens=s["vocab_size"],
        dim=s["dim"],
        depth=s["n_layers"],
        dim_head=s["dim"] // s["n_heads"],
        heads=s["n_heads"],
        ff_expand_factor=1.5 * s["ffn_dim"] / s["dim"],
        add_value_residual=False,
        manual_norm_weights=True,
    )
    return model, model


def megatron_core(s: Shape) -> tuple[nn.Module, Logits]:
    import megatron.core.tensor_parallel.random as random
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    # It asks for the current GPU, and for a GPU's random numbers, of which this model needs none.
    torch.cuda.current_device = lambda: torch.device("cpu")
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=s["n_layers"],
        hidden_size=s["dim"],
        num_attention_heads=s["n_heads"],
        ffn_hidden_size=s["ffn_dim"],
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=s["vocab_size"],
        max_sequence_length=s["seq_len"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    positions = torch.arange(s["seq_len"])[None].expand(s["rows"], -1)
    mask = torch.ones(s["seq_len"], s["seq_len"], dtype=torch.bool).triu(1)[None, None]
    return model, lambda tokens: model(tokens, positions, mask)


LIBRARIES = {
    f.__name__: f for f in (transformers, litgpt, olmo_core, torchtitan, torchscale, ngpt_pytorch, megatron_core)
}


def blocks(model: nn.Module, n_layers: int) -> list[nn.Module]:
    """The layers, by their number."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList | nn.ModuleDict) and len(m) == n_layers)
    found = next(lists)
    return list(found.values()) if isinstance(found, nn.ModuleDict) else list(found)


Step = Callable[[], None]


def plain_step(make: Callable[[Shape], tuple[nn.Module, Logits]], s: Shape) -> tuple[Step, int]:
    model, logits = make(s)
    model.train()
    match s["how"]:
        case "compiled":
            for block in blocks(model, s["n_layers"]):
                block.compile()
        case "compiled whole":
            model.compile()
        case "checkpointed":
            model.gradient_checkpointing_enable()  # of transformers alone
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = torch.randint(s["vocab_size"], (s["rows"], s["seq_len"] + 1), generator=torch.Generator().manual_seed(0))
    cast = torch.autocast("cpu", torch.bfloat16) if s["precision"] == "bf16" else nullcontext()

    def step() -> None:
        with cast:
            found = logits(rows[:, :-1])
        F.cross_entropy(found.float().flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "norm_weights_"):
            model.norm_weights_()  # nGPT's projection

    return step, sum(p.numel() for p in model.parameters())


def nlm(s: Shape) -> tuple[Step, int]:
    from nlm.batch import Batch
    from nlm.build import build_engine, parse_config
    from nlm.mesh import Mesh
    from nlm.runtime import collected_by_hand, keep_freed_memory

    keep_freed_memory()
    sizes = ("n_layers", "dim", "n_heads", "ffn_dim", "vocab_size")
    config = parse_config(
        {
            "model": {"activation": "swiglu", "norm": "rmsnorm"} | {key: s[key] for key in sizes} | s["model"],
            "train": {
                "steps": 1,
                "batch_tokens": s["rows"] * s["seq_len"],
                "seq_len": s["seq_len"],
                "precision": s["precision"],
            },
            "optim": {"lr": 1e-4},
            "parallel": {"compile": "compiled" in s["how"], "recompute": "sqrt" if "sqrt" in s["how"] else "none"},
            "data": {"train": "-"},
            "log": {"dir": "-"},
        }
    )
    engine = build_engine(config, Mesh())
    rows = Batch(torch.randint(s["vocab_size"], (s["rows"], s["seq_len"] + 1)))
    collected_by_hand().__enter__()

    def step() -> None:
        engine.forward_backward(rows)
        engine.clip()
        engine.update(1e-4)

    return step, sum(tensor.numel() for tensor in engine.pieces.tensors)


def floor(s: Shape) -> tuple[Step, int]:
    """Nothing but the matrix products and the attention of the same step: what no library does without."""
    tokens, dim, ffn = s["rows"] * s["seq_len"], s["dim"], s["ffn_dim"]
    torch.set_default_dtype(torch.bfloat16 if s["precision"] == "bf16" else torch.float32)
    x = {n: torch.randn(tokens, n) for n in (dim, ffn, s["vocab_size"])}
    inner = 1 if s["model"].get("activation") == "relu" else 2  # a gate is one more
    shapes = [*[(dim, dim)] * 4, *[(dim, ffn)] * inner, (ffn, dim)]
    weights = [torch.randn(shape) for _ in range(s["n_layers"]) for shape in shapes]
    weights.append(torch.randn(dim, s["vocab_size"]))
    q, k, v = (
        torch.randn(s["rows"], s["n_heads"], s["seq_len"], dim // s["n_heads"]).requires_grad_() for _ in range(3)
    )

    def step() -> None:
        for w in weights:
            n, m = w.shape
            torch.mm(x[n], w)
            torch.mm(x[m], w.T)
            torch.mm(x[n].T, x[m])
        for _ in range(s["n_layers"]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, [q, k, v], out.detach())

    return step, sum(w.numel() for w in weights)


OURS = {f.__name__: f for f in (nlm, floor)}


def answers(step: Step, parameters: int) -> Iterator[dict[str, float]]:
    for line in sys.stdin:
        n = int(line)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(n):
            step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield {"cpu_s": cpu / n, "wall_s": wall / n, "peak_gib": peak, "parameters": parameters}


if __name__ == "__main__":
    name, shape = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    for answer in answers(*(OURS[name](shape) if name in OURS else plain_step(LIBRARIES[name], shape))):
        print("answer", json.dumps(answer), flush=True)
