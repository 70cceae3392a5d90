"""How long EVA looks at activations, what it makes of them, and how it chooses among their components."""

from __future__ import annotations

from dataclasses import dataclass

from eva_rl.errors import UserError

CHOICES = {
    "convergence": ("subspace", "components"),
    "method": ("streaming", "covariance"),
    "weighting": ("none", "gradient"),
    "ranking": ("ratio", "paper"),
    "budget": ("ranks", "weights"),
    "components": ("leading", "minor", "random"),
}


@dataclass(frozen=True)
class EvaSettings:
    rho: float = 2.0
    """A layer may get up to rho times its nominal rank; 1 keeps all ranks equal."""
    tau: float = 0.99
    """A layer has converged when its `convergence` measure is at least this."""
    convergence: str = "subspace"
    """`subspace`: the share of variance that the layer's subspace is expected to capture of what the best one would,
    for the data the batches are drawn from. Estimated from how much the last batch improved on the subspace of the
    batch before; nearly equal singular values do not disturb it. It speaks of data like the batches seen: draw the first of them
    from all parts of the data. `components`: the least cosine between a component and
    its predecessor a batch ago, peft's rule. Both look at as many components as the layer's present rank."""
    max_batches: int = 64
    method: str = "streaming"
    """`streaming` or `covariance`, see `StreamingSvd` and `Covariance`. Streaming is the default by measurement: after as
    many batches its worst layer captures what exact covariances do to within 0.0002, in half the time, of which most is
    then the forward passes' (`benchmarks/results/`); and its memory does not grow with the square of the width."""
    center: bool = True
    """Components about the mean, as published; False: about zero, the `Sigma = E[x x^T]` of theorem 3.2."""
    weighting: str = "none"
    """`gradient`: a row counts by the squared norm of the gradient that arrives at the layer's output for it. For one
    row, dL/dB = g (A x)^T; so with center=False the components maximise `Tr(A E[|g|^2 x x^T] A^T) = E|dL/dB|_F^2`
    without the independence of g and x that theorem 3.2 assumes."""
    ranking: str = "ratio"
    """What components are worth when ranks are shared out: `ratio` or `paper`, see `explained`."""
    budget: str = "ranks"
    """What stays the same when ranks are shared out: their sum (`ranks`, as published), or the number of weights in A and B
    (`weights`), of which a rank costs wide layers more."""
    components: str = "leading"
    """`minor` (those of least variance; needs method=covariance) and `random` (orthonormal) are the paper's ablations:
    other directions at the ranks that the leading ones would get."""
    rotation: bool = False
    """Mix A's rows by a random rotation: the same subspace, no component on its own axis."""
    permutation: bool = False
    """Shuffle the entries of each of A's rows: the same norms and values, no direction left."""
    whiten: bool = False
    """Divide each row by the standard deviation along it, so that A x has unit variance in every direction."""
    seed: int = 0
    """Of the random choices: components, rotation, permutation, and the first vectors of the iteration."""

    def __post_init__(self) -> None:
        if not self.rho >= 1 or not 0 < self.tau <= 1 or self.max_batches < 1:
            raise UserError(
                f"EVA was given rho={self.rho}, tau={self.tau}, max_batches={self.max_batches}, where rho >= 1, "
                "0 < tau <= 1 and max_batches >= 1 were expected."
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"EVA was given {name}={getattr(self, name)}, where one of {choices} was expected.")
        if self.components == "minor" and self.method == "streaming":
            raise UserError(
                "components=minor was given with method=streaming, which follows the leading components only: add "
                "method=covariance."
            )
        if self.whiten and (self.components != "leading" or self.rotation or self.permutation):
            raise UserError(
                "whiten=true divides leading components by their own deviations: leave out the other choices."
            )
