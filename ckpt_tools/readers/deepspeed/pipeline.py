from typing import Any


def read_pipeline(names: Any) -> Any:
    raise NotImplementedError
