"""nn.Linear with perturbed weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._seeds import Seed, check_seed, check_stream, domain_of
from ..perturb.op import weight_scale
from .op import perturbed_linear
from .sharding import is_sharded, sharded_linear, whole

#: The values of sigma that a layer can learn, as shapes of a weight [N, K].
LEARNABLE = ("scalar", "row", "element")


class PerturbedLinear(nn.Linear):
    """nn.Linear whose weight and bias are perturbed at every call, without being written or copied.

    y = x (W + sigma * epsilon)^T + b + sigma_b * epsilon_b. sigma is `intensity * weight_scale(weight)`, detached, and
    sigma_b likewise of the bias (0 for a single element); or `intensity` times a parameter that is learned. The noise
    is that of `seed` and `stream`: the same at every call until one of them changes, so set `seed` once a step, such as
    to `seed_for(run_seed, name) + step`, or to an int64 tensor [P] for a population.

    The state dict is nn.Linear's, with `sigma` (and `bias_sigma`) beside it where they are learned; one of nn.Linear
    loads into either. Parameters may be DTensors, sharded by rows or by columns: each shard has the noise of the whole.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear.
        intensity: the factor of both sigmas; may be set later, to any float, and is not part of the state.
        learnable_sigma: None, or what has a sigma of its own: "scalar", "row" or "element" (then the bias, too).
        initial_sigma: what learned sigmas begin with (0.017: Fortunato et al. 2018, "Noisy networks for exploration",
            for factors that are not shared).
        perturb_bias: whether the bias has noise.
        distribution: "normal" or "rademacher".
        seed, stream: of the noise; attributes that may be set.

    Shapes: x [.., in_features] -> [.., out_features]; with seeds [P] as in `perturbed_linear`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """

    sigma: Tensor | None
    bias_sigma: Tensor | None
    _intensity: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        intensity: float = 1.0,
        learnable_sigma: str | None = None,
        initial_sigma: float = 0.017,
        perturb_bias: bool = True,
        distribution: str = "normal",
        seed: Seed = 0,
        stream: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if learnable_sigma is not None and learnable_sigma not in LEARNABLE:
            raise ValueError(f"learnable_sigma: expected None, {', '.join(LEARNABLE)}, got {learnable_sigma!r}")
        domain_of(distribution)
        check_stream(stream)
        self.distribution, self.stream = distribution, stream
        self.perturb_bias = bool(perturb_bias and bias)
        self.learnable_sigma = learnable_sigma
        self.seed = seed
        # A buffer: a compiled layer must not be compiled again at every value of a schedule.
        factor = torch.ones((), dtype=torch.promote_types(self.weight.dtype, torch.float32), device=device)
        self.register_buffer("_intensity", factor, persistent=False)
        self.intensity = intensity
        self.register_parameter("sigma", None)
        self.register_parameter("bias_sigma", None)
        if learnable_sigma is not None:
            shape = {"scalar": (), "row": (out_features, 1), "element": (out_features, in_features)}[learnable_sigma]
            bias_shape = () if learnable_sigma == "scalar" else (out_features,)
            self.sigma = nn.Parameter(torch.full(shape, initial_sigma, dtype=factor.dtype, device=device))
            if self.perturb_bias:
                self.bias_sigma = nn.Parameter(torch.full(bias_shape, initial_sigma, dtype=factor.dtype, device=device))

    @property
    def intensity(self) -> float:
        """The factor of sigma."""
        return self._level

    @intensity.setter
    def intensity(self, value: float) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"intensity: expected a float, got {type(value).__name__}")
        self._level = float(value)
        self._silent = value == 0
        with torch.no_grad():
            self._intensity.fill_(value)

    @property
    def seed(self) -> Seed:
        """The seed of the noise: an int, or an int64 tensor, 0-dim or [P]."""
        return self._seed

    @seed.setter
    def seed(self, value: Seed) -> None:
        check_seed(value, self.weight.device)
        self._seed = value

    def _sigmas(self) -> tuple[Tensor, Tensor | None]:
        if self.sigma is not None:
            bias_sigma = None if self.bias_sigma is None else self._intensity * self.bias_sigma
            return self._intensity * self.sigma, bias_sigma
        with torch.no_grad():
            sigma = self._intensity * weight_scale(whole(self.weight))
            bias_sigma = self._intensity * weight_scale(whole(self.bias)) if self.perturb_bias else None
        return sigma, bias_sigma

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features], or [P, .., out_features] for seeds [P]."""
        seed = self.seed
        if self._silent and not (isinstance(seed, Tensor) and seed.dim()):
            return F.linear(x, self.weight, self.bias)
        sigma, bias_sigma = self._sigmas()
        noise: dict[str, Any] = {"seed": seed, "stream": self.stream, "distribution": self.distribution}
        if is_sharded(self.weight):
            return sharded_linear(x, self.weight, self.bias, sigma, bias_sigma, **noise)
        return perturbed_linear(x, self.weight, self.bias, sigma=sigma, bias_sigma=bias_sigma, **noise)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # nn.Linear's state has no sigmas: those of this layer stay as they are.
        for name in ("sigma", "bias_sigma"):
            own = getattr(self, name)
            if own is not None and prefix + "weight" in state_dict:
                state_dict.setdefault(prefix + name, own.detach())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        learned = f", learnable_sigma={self.learnable_sigma!r}" if self.learnable_sigma else ""
        return f"{super().extra_repr()}, intensity={self.intensity}, distribution={self.distribution!r}{learned}"
