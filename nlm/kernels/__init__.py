"""What computes several operations at once, or one in parts, each beside the plain way that it replaces.

| operation | eager | compiled | `parallel.kernels = "triton"` |
|---|---|---|---|
| residual sum and the norms beside it | torch | Inductor | residual.py |
| nGPT's step on the sphere | torch | Inductor | sphere.py |
| rotary positions, norms of heads | torch | Inductor | rotary.py |
| activations and gates, DyT, ELN, head scales | torch | Inductor | Inductor |
| attention | torch's scaled dot product | the same | the same |
| logits and cross-entropy | rows.py | rows.py | rows.py |
| AdamW | torch's fused, of many tensors | the same | adamw.py |
| projection to norm 1 after it | torch | the same | adamw.py, of what a rank has whole slices of |

No operation of one element each is written by hand: Inductor makes one kernel of any chain of them. The Triton kernels
are put into the graph of a block by fuse.py, which finds them by what is computed there; the optimizer's is chosen
where optimizers are made (nlm.optim). All are compared with their references on the shapes of the run before it starts
(check.py).
"""
