"""A worker whose model never comes back: started as a process by test_main."""

import sys
import time

from service.settings import Settings
from service.worker import main, runner


def hang(*_: object) -> None:
    print("hanging", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    runner.Runner.run = hang  # type: ignore[method-assign,assignment]
    sys.exit(main.run(Settings()))
