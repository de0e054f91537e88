"""Seconds by stage."""

import contextlib
import time
from collections import Counter

import torch


class Clock:
    """`with clock("explore"): ...` adds the time inside to the seconds of "explore". Time in an
    inner stage is not counted for the outer one. On a GPU each switch waits for work under way."""

    def __init__(self, device):
        self.device, self.seconds, self.stages = torch.device(device), Counter(), []
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage):
        self._book()
        self.stages.append(stage)
        try:
            yield
        finally:
            self._book()
            self.stages.pop()

    def take(self):
        """{stage: seconds} since the last time that this was called."""
        seconds, self.seconds = self.seconds, Counter()
        return dict(seconds)

    def _book(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.stages:
            self.seconds[self.stages[-1]] += now - self.since
        self.since = now
