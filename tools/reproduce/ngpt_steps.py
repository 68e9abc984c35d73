"""nGPT gets further than a GPT in the same number of steps."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import best, less, lowest

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
MODEL = {"n_layers": 4, "activation": "swiglu", "ffn_dim": 128}
STEPS = {"steps": 200}


def measure() -> list[Check]:
    ngpt = best(RATES, "ngpt", MODEL, train=STEPS, optim={"weight_decay": 0.0, "final_lr_frac": 0.0})
    gpt = best(RATES, "pre_ln", MODEL, train=STEPS, optim={"warmup_steps": 20})
    i, j = lowest(ngpt), lowest(gpt)
    return [less("loss", f"nGPT at lr {RATES[i]:g}", ngpt[i], f"GPT at {RATES[j]:g}", gpt[j])]


CLAIM = Claim(
    {"schemes": ("ngpt",)},
    "Loshchilov et al. 2024, arXiv:2410.01131",
    "nGPT, without warmup and weight decay, needs 4 to 20 times fewer steps than a GPT: it is ahead after as many",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("ngpt_steps")
