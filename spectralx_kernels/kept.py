"""What is made of a module's tensors, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class Kept:
    """Keeps what a function makes of tensors; makes it again once one of them is another.

    Tensors are told by identity, memory and version, so that an optimiser's step, a loaded state
    dict or a move to another device are noticed. Nothing is kept of tensors made under
    ``inference_mode``, which have no version.
    """

    def __init__(self) -> None:
        self._used: tuple[Tensor, ...] = ()  # held, so that no other takes their identity
        self._state: list[tuple[int, int]] = []
        self._made: tuple[Tensor, ...] = ()

    def of(
        self, used: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`make()`, or what it returned for these very tensors."""
        if any(tensor.is_inference() for tensor in used):
            return make()
        state = [(tensor.data_ptr(), tensor._version) for tensor in used]
        same = state == self._state and all(
            one is other for one, other in zip(used, self._used, strict=True)
        )
        if not same:
            self._made = make()
            self._used, self._state = tuple(used), state
        return self._made

    def forget(self) -> None:
        """Free what is kept."""
        self._used, self._state, self._made = (), [], ()
