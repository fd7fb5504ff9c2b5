import numpy as np

from pace.reference.pack_experts import MXFP4, PackedExperts

ROWS, COLUMNS = 2880, 2880  # GPT-OSS


def bench_pack_experts(race):
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (ROWS, COLUMNS // 32, 16), np.uint8)
    scales = generator.integers(100, 140, (ROWS, COLUMNS // 32), np.uint8)
    into = PackedExperts.empty(1, ROWS, COLUMNS, MXFP4)
    into.panels.fill(0)  # so that no page is touched for the first time while the clock runs
    race(
        "pack_experts",
        codes,
        into,
        0,
        scales,
        shape=f"{ROWS} × {COLUMNS}, mxfp4",
        num_bytes=2 * (codes.nbytes + scales.nbytes),
        cold=True,
        rtol=0,
        atol=0,  # codes move, nothing is rounded
    )
