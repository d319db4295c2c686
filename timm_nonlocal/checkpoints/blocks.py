"""What is known of a nonlocal block in a state dict: where its tensors are, and what they are called."""

from dataclasses import dataclass, field, replace

from .stored import STABLE, Stored

__all__ = ['Block', 'Found', 'Shape']

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Where one block's tensors are. Names are those of the state dict it was found in.

    Attributes:
        stage: the prefix of the nonlocal module, without the wrappers' prefixes.
        index: the block's number in it.
        name: the block's own prefix.
        naming: the layout's name, or 'key-map'.
        formulation: 'original' (eq. (1)), 'proposed' (eq. (8)), or 'unknown' (ours without θ: see `told`).
        symmetric: whether φ = θ; None where the names do not tell.
        g, z: how W_g and W_Z are stored.
        norm: prefix of a batch norm after W_Z, with running statistics.
        scale: a number that multiplies the block's output.
        basis: of the orthonormal W_g where the block is stable by construction (`layers.stable`); then w_g and w_z are
            what both are made from, (C', C) and (C', C').
        w_g, w_z: the names of the tensors of their shapes, (C', C[, 1…]) and (C, C'[, 1…]).
    """

    stage: str
    index: int
    name: str
    naming: str
    formulation: str
    symmetric: bool | None
    g: Stored
    z: Stored
    norm: str | None = None
    scale: str | None = None

    def told(self, formulation: str | None) -> 'Block':
        """The block with what others say of it where its names do not tell: without θ there is no φ."""
        if self.formulation != 'unknown' or formulation is None:
            return self
        return replace(self, formulation=formulation, symmetric=True)

    @property
    def w_g(self) -> str:
        return self.g.names[0]

    @property
    def w_z(self) -> str:
        return self.z.names[0]

    @property
    def basis(self) -> str | None:
        return self.g.names[1] if self.g.form == STABLE[0] else None

    @property
    def names(self) -> list[str]:
        """Every tensor that the block's spectrum needs."""
        norm = [f'{self.norm}.{part}' for part in ('weight', 'running_var')] if self.norm else []
        return [*self.g.names, *self.z.names, *norm, *filter(None, (self.scale,))]

    @property
    def keys(self) -> dict[str, str | None]:
        """The names as the JSON shows them."""
        return {'w_z': self.w_z, 'w_g': self.w_g, 'bn': self.norm, 'scale': self.scale}


@dataclass
class Found:
    """The blocks in natural order of their names, and what was looked at and left out, in words.

    `unread` has the layers that blocks were left out for, each with the names of its tensors, as no known form of a
    weight fits them: a module can say what its weight is (`stored.own_weight`), a file cannot.
    """

    blocks: list[Block] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unread: dict[str, list[str]] = field(default_factory=dict)
