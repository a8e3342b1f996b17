"""Draws docs/figures/kernel.svg: one token on its way through the kernel. Its numbers are those of the reference.

python -m tools.draw_kernel
"""

import itertools
import math
from pathlib import Path

import torch

from neft_kernels.ops.reference import noisy_embedding, philox4x32, uniform

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "kernel.svg"

SEED, TOKEN, TOKEN_ID = 42, 2, 305
ROW = torch.tensor([0.0213, -0.0147, 0.0068, 0.0391])  # the first four columns of the token's row
ALPHA, LENGTH, WIDTH = 5.0, 512, 4096

LEFT, BOX, GAP, STAGE, HEIGHT = 268, 156, 12, 76, 34
INK, FAINT, MEMORY, DRAW, SUM = "#1f2937", "#6b7280", "#dbeafe", "#fef3c7", "#dcfce7"


def stages() -> list[tuple[str, str, list[str], str]]:
    """Title, explanation, the contents of the boxes, and their colour."""
    magnitude = ALPHA / math.sqrt(LENGTH * WIDTH)
    zero = torch.tensor(0)
    words = philox4x32((zero, torch.tensor(TOKEN), zero, zero), (torch.tensor(SEED), zero))
    seed = torch.tensor([SEED])
    u = uniform(torch.tensor([TOKEN]), 4, torch.float32, seed)[0]
    ids = torch.zeros(TOKEN + 1, dtype=torch.int64)
    out = noisy_embedding(ids, ROW[None], seed, None, magnitude, 0, 0)[TOKEN]
    return [
        ("1  Gather", f"row {TOKEN_ID} of the table, 16 bytes a load", [f"{w:+.4f}" for w in ROW.tolist()], MEMORY),
        ("2  Counter", f"where we are; the key is the seed, {SEED}", ["block 0", f"token {TOKEN}", "0", "stream 0"], DRAW),
        ("3  Philox4x32-10", "ten rounds of multiply and xor", [f"{word.item():08x}" for word in words], DRAW),
        ("4  Uniform", "((int32 &gt;&gt; 8) | 1) · 2⁻²³", [f"{value:+.6f}" for value in u.tolist()], DRAW),
        ("5  Scale", f"m = 5 / √({LENGTH} · {WIDTH}) = {magnitude:.5f}",
         [f"{value:+.6f}" for value in (magnitude * u).tolist()], DRAW),
        ("6  Add and round", "to float32, then to the table's type", [f"{value:+.6f}" for value in out.tolist()], SUM),
    ]  # fmt: skip


def draw() -> str:
    rows = stages()
    width, height = LEFT + 4 * (BOX + GAP) + 36, 28 + len(rows) * STAGE
    style = "font-family: ui-sans-serif, system-ui, sans-serif; font-size: 14px"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{style}" role="img" '
        'aria-label="One token in the kernel: gather, counter, Philox, uniform, scale, add and round">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{FAINT}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
    ]

    def arrow(*points: tuple[float, float]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{FAINT}" marker-end="url(#tip)"/>')

    tops = [20 + number * STAGE for number in range(len(rows))]
    for (title, why, boxes, colour), top in zip(rows, tops, strict=True):
        parts.append(f'<text x="24" y="{top + 15}" fill="{INK}" font-weight="600">{title}</text>')
        parts.append(f'<text x="24" y="{top + 33}" fill="{FAINT}" font-size="12">{why}</text>')
        for column, text in enumerate(boxes):
            x = LEFT + column * (BOX + GAP)
            parts.append(
                f'<rect x="{x}" y="{top}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="{FAINT}"/>'
                f'<text x="{x + BOX / 2:g}" y="{top + 22}" text-anchor="middle" fill="{INK}" '
                f'font-family="ui-monospace, monospace">{text}</text>'
            )
    for column in range(4):
        middle = LEFT + column * (BOX + GAP) + BOX / 2
        for above, below in itertools.pairwise(tops[2:]):
            arrow((middle, above + HEIGHT), (middle, below - 2))
    # All four words of the counter go into all four words of the draw.
    right = LEFT + 4 * (BOX + GAP) - GAP
    bus = tops[1] + HEIGHT + (STAGE - HEIGHT) / 2
    for column in range(4):
        middle = LEFT + column * (BOX + GAP) + BOX / 2
        parts.append(f'<path d="M{middle:g} {tops[1] + HEIGHT}V{bus:g}" stroke="{FAINT}"/>')
        arrow((middle, bus), (middle, tops[2] - 2))
    parts.append(f'<path d="M{LEFT + BOX / 2:g} {bus:g}H{right - BOX / 2:g}" stroke="{FAINT}"/>')
    # The row waits in registers while the noise is drawn.
    side = right + 18
    arrow((right, tops[0] + HEIGHT / 2), (side, tops[0] + HEIGHT / 2), (side, tops[5] + HEIGHT / 2),
          (right + 2, tops[5] + HEIGHT / 2))  # fmt: skip
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main() -> None:
    FIGURE.write_text(draw())


if __name__ == "__main__":
    main()
