"""`stage_order` on machine code that is written here: what must be done before a stage is given back, and what need not."""

from __future__ import annotations

import pytest
from stage_order import early_arrivals

WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x1000], R0"
ARRIVE = "@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x1010], RZ"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0, 0x80"
LOAD, TAKE, TAKE_UNASKED = "w1 LDS.128 R8, [R2]", "?1 IADD3 R4, R8, R9, RZ", "IADD3 R4, R8, R9, RZ"
PRODUCT, PRODUCT_OF_GROUP = "HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR8], R24", "HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0"
SETUP = ("SYNCS.EXCH.64 URZ, [UR4+0x1000], UR6", "SYNCS.EXCH.64 URZ, [UR4+0x1010], UR6", "STS [R0+0x2000], R1")


def early(*code: str) -> list[tuple[str, str]]:
    """Arrivals and reads as they are written here. "w1" before an instruction: its result has scoreboard 1. "?1": it waits for that."""
    lines, written = [], {}
    for at, line in enumerate((*SETUP, *code, "EXIT")):
        if line.startswith("."):
            lines.append(f"{line}:")
            continue
        mark, _, text = line.partition(" ") if line[0] in "w?" else ("", "", line)
        control = (int(mark[1:]) if mark.startswith("w") else 7) << 46 | ((1 << int(mark[1:])) << 52 if mark.startswith("?") else 0)
        lines.append(f"        /*{16 * at:04x}*/    {text} ;  /* 0x{0:016x} */\n  /* 0x{control:016x} */")
        written[16 * at] = line
    return [(written[arrival], written[read]) for arrival, read in early_arrivals("\n".join(lines))]


@pytest.mark.parametrize(
    "done",
    [
        (TAKE, BARRIER),
        (TAKE_UNASKED.replace("R4", "R5"), "?1 FMUL R6, R5, R5", BARRIER),  # whoever waits
        ("MEMBAR.ALL.CTA", "FENCE.VIEW.ASYNC.S", BARRIER),
        (BARRIER, BARRIER, TAKE, BARRIER),
    ],
)
def test_a_load_is_done_when_its_scoreboard_was_waited_for_or_behind_a_fence(done: tuple[str, ...]) -> None:
    assert early(WAIT, LOAD, *done, ARRIVE, TAKE_UNASKED) == []


@pytest.mark.parametrize("late", [(BARRIER, ARRIVE, TAKE), (TAKE, ARRIVE), (BARRIER, TAKE, ARRIVE), ("?0 NOP", BARRIER, ARRIVE, TAKE)])
def test_it_is_not_done_in_all_warps_unless_a_barrier_follows(late: tuple[str, ...]) -> None:
    assert early(WAIT, LOAD, *late) == [(ARRIVE, LOAD)]


def test_a_load_without_a_scoreboard_has_that_of_the_next() -> None:
    first = "LDS R20, [R3]"
    assert early(WAIT, first, LOAD, TAKE, BARRIER, ARRIVE, "FMUL R1, R20, R20") == []
    assert early(WAIT, LOAD, first, TAKE, BARRIER, ARRIVE, "FMUL R1, R20, R20") == [(ARRIVE, first)]


def test_products_are_done_when_so_few_groups_are_left() -> None:
    left = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"
    assert early(WAIT, PRODUCT, PRODUCT_OF_GROUP, left.format(0), BARRIER, ARRIVE) == []
    assert early(WAIT, PRODUCT, PRODUCT_OF_GROUP, left.format(1), BARRIER, ARRIVE) == [(ARRIVE, PRODUCT), (ARRIVE, PRODUCT_OF_GROUP)]
    next_stage = (WAIT, PRODUCT_OF_GROUP.replace("R24", "R32"))
    assert early(WAIT, PRODUCT, PRODUCT_OF_GROUP, *next_stage, left.format(1), BARRIER, ARRIVE) == []


def test_what_nobody_takes_may_be_late() -> None:
    assert early(WAIT, LOAD, BARRIER, ARRIVE, "IADD3 R8, R1, R1, RZ", "IADD3 R9, R8, R8, RZ") == []


def test_the_next_stage_may_be_under_way_and_every_way_round_a_loop_is_followed() -> None:
    wait_again = (".L_x_2", "LDL R0, [R1+0x8]", WAIT, "@!P0 BRA `(.L_x_2)")
    loop = (WAIT, LOAD, ".L_x_1", TAKE, WAIT, *wait_again, LOAD, BARRIER, ARRIVE, "@P2 BRA `(.L_x_1)", TAKE, BARRIER, ARRIVE)
    assert early(*loop) == []
    late = "w1 LDS.128 R12, [R2+0x800]"  # taken behind the arrival, in the next iteration alone
    assert early(*loop[:3], "?1 IADD3 R4, R12, R12, RZ", TAKE, late, *loop[4:]) == [(ARRIVE, late)]


def test_barriers_are_found_by_what_was_added_to_registers() -> None:
    address = ("UMOV UR4, 0x400", "ULEA UR4, UR5, UR4, 0x18", "ULEA UR8, UR9, UR4, 0x3", "UIADD3 UR8, UR8, 0x1010, URZ", "UIADD3 UR8, UR8, 0x8, URZ")
    through = (WAIT.replace("UR4+0x1000", "UR10+-0x10"), LOAD, BARRIER, ARRIVE.replace("UR4+0x1010", "UR10"), TAKE)
    assert early(*address, "UIMAD UR10, UR11, -0x18, UR8", *through) == [(through[3], LOAD)]


def test_a_kernel_is_refused_whose_barriers_no_path_leads_to() -> None:
    with pytest.raises(AssertionError, match="no path"):
        early(LOAD, WAIT, TAKE, BARRIER, ARRIVE)
