"""With GPT-2's init the stream is as large in deep models as in shallow ones."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import build, exponents, rms

DEPTHS = [4, 8, 16, 32, 64]


def measure() -> list[Check]:
    def gpt2(seed: int, n_layers: int) -> float:
        init = {"name": "gpt2", "init_std": 32**-0.5}  # what 0.02 is at a width of 2,500
        return float(rms(build("pre_ln", seed, n_layers=n_layers, init=init))[-1, 1, 2])

    def even(seed: int, n_layers: int) -> float:
        scheme = {"name": "pre_ln", "residual_init": False}
        return float(rms(build("pre_ln", seed, n_layers=n_layers, scheme=scheme))[-1, 1, 2])

    return [
        Check("power of depth of the stream's RMS", [abs(x) for x in exponents(DEPTHS, gpt2)], below=0.1, against=0.3),
        Check("without the 1/sqrt(2L)", exponents(DEPTHS, even), above=0.3),
    ]


CLAIM = Claim(
    {"inits": ("gpt2",)},
    "Radford et al. 2019, section 2.3",
    "What writes the stream starts smaller by 1/sqrt(2L), which accounts for its growth over depth",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("gpt2_stream")
