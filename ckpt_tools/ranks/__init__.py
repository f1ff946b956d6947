"""Owns the processes that carry out one command together, and their messages.

No other room imports torch.distributed. :class:`Ranks` passes small messages through the store of the
launcher (torchrun). No rank waits in a collective. So a rank that writes for an hour causes no timeout, and a
rank that fails or is killed ends the others within seconds. :mod:`.joining` finds the other ranks.
:mod:`.line` calls the store with a time limit. :mod:`.pulse` sends heartbeats and watches those of other
ranks. :mod:`.exchange` sends bytes that only one process can read. :mod:`.pooling` makes one checkpoint of
the files of all machines.
"""

from __future__ import annotations

from ckpt_tools.ranks.exchange import Exchange
from ckpt_tools.ranks.joining import from_environment, from_process_group
from ckpt_tools.ranks.pooling import pooled_machines
from ckpt_tools.ranks.session import Ranks

__all__ = ["Exchange", "Ranks", "from_environment", "from_process_group", "pooled_machines"]
