"""Several processes that carry out one command together: who they are, and what they tell each other.

The only room that knows torch.distributed. :class:`Ranks` passes small messages through the store of the
launcher (torchrun): nothing waits in a collective, so a rank that writes for an hour makes no other rank
time out, and a rank that fails or is killed ends the others within seconds. :mod:`.line` is the way to that
store, with a limit; :mod:`.pulse` gives signs of life and watches those of others; :mod:`.exchange` moves
bytes that only one process can reach, and :mod:`.pooling` makes one checkpoint of what each machine has.
Knows nothing of checkpoints, plans or outputs: messages are values.
"""

from __future__ import annotations

from ckpt_tools.ranks.exchange import Exchange
from ckpt_tools.ranks.joining import from_environment, from_process_group
from ckpt_tools.ranks.pooling import pooled_machines
from ckpt_tools.ranks.session import Ranks

__all__ = ["Exchange", "Ranks", "from_environment", "from_process_group", "pooled_machines"]
