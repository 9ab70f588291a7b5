"""`headrace_kernels.latent_load` in plain torch: its specification."""

from __future__ import annotations

from headrace_kernels.latent_load import latent_load_ref as latent_load

__all__ = ["latent_load"]
