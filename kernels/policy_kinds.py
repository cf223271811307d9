"""Every kind of policy loss by its name (TRL's and verl's where they have one)."""

from __future__ import annotations

from .policy_kind import Kind
from .policy_sequence_kinds import SEQUENCE_KINDS
from .policy_token_kinds import TOKEN_KINDS

KINDS: dict[str, Kind] = {**TOKEN_KINDS, **SEQUENCE_KINDS}
