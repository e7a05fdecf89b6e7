"""Without a CUDA device the Triton kernels run in Triton's interpreter."""

import os

import torch

# Triton reads the variable once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _accept_numpy_2_4() -> None:
    """Lets `range` take scalars: older interpreters convert them as NumPy 2.4 forbids."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1":
    _accept_numpy_2_4()
