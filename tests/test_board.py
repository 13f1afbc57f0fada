"""Where a plan stands: states, estimates, and what is heard too late."""
from types import SimpleNamespace
import pytest
from fer_core.artifacts import FerError
from fer_core.runs import board as module
from fer_core.runs.board import Board, say_time
from fer_core.runs.plan import Step

RUN = SimpleNamespace(folder=SimpleNamespace(name='2026-01-01-teacher-000000'))


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000., monotonic=lambda: clock.now)
    monkeypatch.setattr(module, 'time', clock)
    return clock


def plan(n=4, stage='teacher'): return [Step(f'{stage}[{k}]', stage, {}) for k in range(n)]


def begin(board, *steps):
    for s in steps: board.show(1, 1, s, 0, 1, 'starting')


def test_every_step_is_in_one_state(clock):
    steps = plan(6)
    board = Board(steps)
    begin(board, *steps[:3])
    board.ended(steps[0], RUN, False, 10.); board.ended(steps[4], RUN, True, 0.)
    board.lost(steps[1], FerError('nan_loss', 'not finite'))
    assert dict(board.count()) == {'ended': 2, 'nan_loss': 1, 'under way': 1, 'waiting': 2} and board.line().startswith('2/6 ended, 1 failed (nan_loss 1), about ')
    table = board.table()
    assert list(table.state) == ['nan_loss', 'under way', 'waiting', 'waiting', 'ended', 'reused'] and table.what[0] == 'not finite' and table.what[4] == '2026-01-01-teacher-000000'


def test_what_is_heard_too_late_does_not_count_and_a_step_may_begin_again(clock):
    steps = plan(2)
    board = Board(steps)
    begin(board, *steps)
    board.ended(steps[0], RUN, False, 5.); board.lost(steps[1], FerError('kernel_died', 'killed; it is started again'))
    for s in steps: board.show(1, 2, s, 1, 2, 'epoch 1/2')
    assert dict(board.count()) == {'ended': 1, 'kernel_died': 1}
    clock.now += 100
    begin(board, steps[1]); board.show(2, 2, steps[1], 1, 2, 'epoch 1/2')
    clock.now += 10
    assert dict(board.count()) == {'ended': 1, 'under way': 1} and board.left() == 10. and board.table().time[0] == '10 s'


def test_nothing_is_promised_before_a_step_has_told_how_long_it_takes(clock):
    steps = plan(4)
    board = Board(steps)
    assert board.left() is None and board.line() == '0/4 ended'
    begin(board, *steps[:2]); clock.now += 30
    assert board.left() is None
    board.ended(steps[3], RUN, True, 0.)  # it was there: that says nothing
    assert board.left() is None
    board.show(1, 4, steps[0], 1, 2, ''); board.show(1, 4, steps[1], 3, 4, '')
    assert board.left() is None  # of the one that waits
    board.ended(steps[2], RUN, True, 0.)
    assert board.left() == (30 + 10)/2


def test_a_step_that_waits_takes_as_long_as_others_of_its_stage(clock):
    a, b = plan(3, 'teacher'), plan(2, 'ensemble')
    board = Board([*a, *b])
    begin(board, a[0]); clock.now += 60; board.ended(a[0], RUN, False, 60.)
    assert board.left() == 2*60 + 2*60  # nothing is known of ensembles
    begin(board, b[0]); clock.now += 4; board.ended(b[0], RUN, False, 4.)
    assert board.left() == 2*60 + 4
    begin(board, a[1]); clock.now += 90  # longer than usual, and no progress told
    assert board.left() == 0 + 60 + 4
    for s in (a[1], a[2], b[1]): board.ended(s, RUN, False, 60.)
    assert board.left() == 0 and board.line() == '5/5 ended'


def test_steps_that_were_not_announced_are_taken_in():
    board = Board()
    begin(board, *plan(2))
    assert board.line() == '0/2 ended' and len(board.table()) == 2 and Board().table().empty


@pytest.mark.parametrize('seconds, said', [(0, '0 s'), (89, '89 s'), (90, '2 min'), (5399, '90 min'), (5400, '1.5 h'), (360000, '100.0 h')])
def test_times_are_said_as_people_say_them(seconds, said): assert say_time(seconds) == said


def test_a_page_shows_an_error_as_text():
    board, drawn = Board(plan(40)), []
    board.lost(plan()[0], FerError('unexpected', '<script>alert(1)</script> & more'))
    below = module._Below(board, 5)
    below.handle = SimpleNamespace(update=lambda html: drawn.append(html.data))
    below.draw(); below.draw(now=False)
    assert len(drawn) == 1 and '<script>' not in drawn[0] and '&lt;script&gt;' in drawn[0] and 'and 35 more' in drawn[0] and drawn[0].count('<tr>') == 6
