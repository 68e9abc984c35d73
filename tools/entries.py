"""Every scheme, norm, score and weight norm as keys of [model]: each in plain company, and mixed.

`MIXED` has every entry of every registry at least once, in as many models as there are schemes, and `ENCODERS` what
only encoders have: what is slow to try is tried with these.
"""

from typing import Any

from nlm import NORMS, SCHEMES, SCORES, WEIGHT_NORMS

Model = dict[str, Any]

# By default pRMSNorm divides by two channels of 32, whose size may be next to nothing.
NORM_FIELDS: dict[str, list[Model]] = {
    "layernorm": [{}, {"gain": False}],
    "rmsnorm": [{}, {"eps_outside": True}, {"one_plus": True}, {"gain": False}],
    "prmsnorm": [{"p": 0.3}],
}
SCORE_FIELDS: dict[str, list[Model]] = {
    "qknorm": [{"g0": 3.0}],
    "top_k": [{"k": 3}],
    "sa_softmax": [{}, {"normalized": False}, {"detach": True}],
}
NOT_BOUNDED = {"frozen_layernorm", "frozen_rmsnorm", "none"}
"""What these give is as large as what they read: they need a scheme with small branches. The others go with one that
has norms over every axis there is."""
BATCH_NORMS = ("powernorm", "unified", "batchnorm")
"""Those that have, or are, a form for encoders alone."""
NORM_CHOICES = [
    {"name": name} | fields for name in NORMS if name != "batchnorm" for fields in NORM_FIELDS.get(name, [{}])
]
SCORE_CHOICES = [{"score": name} | fields for name in SCORES for fields in SCORE_FIELDS.get(name, [{}])]


def combination(
    scheme: str = "pre_ln",
    norm: Model | None = None,
    score: Model | None = None,
    weight_norm: str | None = None,
    encoder: bool = False,
) -> tuple[str, Model]:
    """A name, and the keys of [model]."""
    norm, score = norm or {"name": "layernorm"}, score or {"score": "softmax"}
    words = ["encoder"] * encoder + [scheme, *words_of(norm), *words_of(score), *([weight_norm] if weight_norm else [])]
    model: Model = {"scheme": {"name": scheme}, "norm": norm, "attention": score}
    model |= {"weight_norm": weight_norm} if weight_norm else {}
    return "-".join(words), model | ({"architecture": "encoder"} if encoder else {})


def words_of(choice: Model) -> list[str]:
    return [str(value) if key in {"name", "score"} else f"{key}={value}" for key, value in choice.items()]


def mixed() -> dict[str, Model]:
    """Scheme i with norm i + 2 and score i of their lists, which begin again where they end; some normalize weights."""
    # Standardized weights are large: they go with schemes that normalize what a sublayer reads.
    suited = ("pre_ln", "sub_ln", "normformer", "layerscale", "peri_ln", "sandwich_ln", "branch_scaled")
    weight_norms = dict(zip(suited, WEIGHT_NORMS, strict=False))
    scores = [choice for choice in SCORE_CHOICES if "detach" not in choice]  # its gradient has no bound
    found: dict[str, Model] = {}
    for i, scheme in enumerate(SCHEMES):
        # i + 2, so that elementwise norms fall to schemes in which nothing explodes by them.
        norm, score = NORM_CHOICES[(i + 2) % len(NORM_CHOICES)], scores[i % len(scores)]
        name, model = combination(scheme, norm, score, weight_norms.get(scheme))
        found[name] = model
    return found


MIXED = mixed()
ENCODERS = dict(combination("sub_ln", {"name": name}, encoder=True) for name in BATCH_NORMS)
COMBINATIONS: dict[str, Model] = dict(
    [
        *(combination(scheme) for scheme in SCHEMES),
        *(combination("branch_scaled" if norm["name"] in NOT_BOUNDED else "sub_ln", norm) for norm in NORM_CHOICES),
        *(combination(score=score) for score in SCORE_CHOICES),
        *(combination(weight_norm=name) for name in WEIGHT_NORMS),
        *MIXED.items(),
        *ENCODERS.items(),
    ]
)
