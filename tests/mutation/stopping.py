"""Mistakes in how a run is stopped, and in what a command goes on from."""

from __future__ import annotations

from tests.mutation.mutations import group

_ORDERS = "tests/fl_lightning/test_stop_orders.py"
_STARTED = "tests/fl_lightning/test_started_processes.py"
_LIFELINE = "tests/fl_lightning/test_lifeline.py"
_STOPPING = "tests/fl_lightning/test_stopping.py"
_AUTO = f"{_STOPPING}::test_auto_starts_and_goes_on_and_refuses_releases_without_a_checkpoint"
_SLURM = (
    f"{_STOPPING}::test_a_job_that_cannot_be_requeued_says_so "
    f"{_STOPPING}::test_a_folder_for_a_job_and_its_command "
    f"{_ORDERS}::test_a_job_that_was_put_back_goes_on_without_being_told"
)

ORDERS = [
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_who_leaves_says_why_before_it_is_gone",
        ("who leaves says nothing", "            self._tell()\n        if self._line is not None:\n            self._line.close()", "        if self._line is not None:\n            self._line.close()"),
        ("who leaves keeps its lines", "            self._line.close()  # so that nobody waits for this process", "            pass"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_who_has_no_more_work_is_not_lost",
        ("no more work is not said", "            self._line.tell(DONE)\n", "            pass\n"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_LIFELINE}::test_a_signal_is_told_to_process_0 {_LIFELINE}::test_a_loss_is_told_to_all",
        ("a stop is not told", "            self._line.tell(self.asked)\n", "            pass\n"),
        ("the thread tells nothing", "            self._tell()\n            now = time", "            now = time"),
        ("a loss is not told", "if self.asked is None or self._told:", "if not self.asked or self._told:"),
        ("other signals", "known = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]", "known = [signal.SIGTERM, signal.SIGINT]"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_LIFELINE}::test_a_stop_reaches_the_others",
        ("rounds may not finish", "PATIENCE if self.training else 0.0", "0.0"),
        ("others are not heard", "            self._hear(line)\n", "            pass\n"),
        ("between rounds nothing is raised", "        if self.asked:\n            raise Stopped(self.asked)\n\n    # The thread", "        if not self.asked:\n            raise Stopped(self.asked or LOST)\n\n    # The thread"),
        ("status of a signal", "super().__init__(128 + signum if signum else 1)", "super().__init__(signum)"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_STARTED}::test_a_signal_before_all_are_connected_ends_the_processes_that_were_started "
        f"{_STARTED}::test_a_process_that_begins_while_a_signal_comes_is_ended",
        ("processes that were started go on", "            child.terminate()\n", "            pass\n"),
        ("processes that begin are missed", "        self._end_unconnected()\n        until", "        until"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_STARTED}::test_a_process_that_is_started_while_a_signal_comes_is_known",
        ("a start is interrupted", "waits = self._leaving or self._starting", "waits = self._leaving"),
        ("a start goes on after a stop", "        if self.asked is not None and time.monotonic() >= self._interrupt_at:\n            raise Stopped(self.asked)\n", ""),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_STARTED}::test_a_run_that_was_stopped_is_not_taken_apart",
        ("a stopped run is taken apart", "            leave_with(self.status)\n", "            pass\n"),
    ),
    *group(
        "fl_lightning/__main__.py",
        "tests/fl_lightning/test_commands.py::test_a_run_by_command_is_its_process_which_is_gone_in_time",
        ("a run by command outstays a stop", "if given[0] == \"fit\" and arguments is None:", "if False:"),
    ),
    *group(
        "fl_lightning/processes/departure.py",
        f"{_STARTED}::test_a_run_that_was_stopped_is_not_taken_apart",
        ("output is lost at the exit", "            stream.flush()\n", "            pass\n"),
        ("the status is lost at the exit", "    os._exit(_status)\n", "    os._exit(0)\n"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_STARTED}::test_a_started_process_that_fails_is_a_loss",
        ("failed processes are no loss", "        if failed:\n", "        if False:\n"),
        ("ended processes are a loss", "if (status := child.poll())]", "if (status := child.poll()) is not None]"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_STARTED}::test_a_started_process_ends_when_its_parent_is_gone",
        ("a lost parent is no loss", "elif self._parent and os.getppid() != self._parent:", "elif False:"),
        ("a parent that is there is a loss", "os.getppid() != self._parent:", "os.getppid() == self._parent:"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_STARTED}::test_a_started_process_that_was_stopped_is_a_stop "
        f"{_STARTED}::test_a_stop_notices_itself_that_its_parent_is_gone",
        ("a process that was stopped is lost", "    return signum if signum in _signals() else LOST", "    return LOST"),
        ("statuses of a shell are none", "-status if status < 0 else status - 128", "-status"),
        ("the kernel ends who can say why", "        if self._parent:\n            outlive_parent()\n", ""),
        ("everybody outlives a parent", "        if self._parent:\n            outlive_parent()\n", "        outlive_parent()\n"),
    ),
    *group(
        "fl_lightning/processes/child.py",
        f"{_STARTED}::test_a_process_that_imports_ends_with_its_parent "
        f"{_STARTED}::test_a_process_that_a_started_process_starts_has_another_parent "
        f"{_STARTED}::test_a_process_whose_parent_is_gone_before_it_begins_ends",
        ("the kernel is not asked", "    _end_with_parent(signal.SIGKILL)\n", ""),
        ("the kernel is asked for good", "    _end_with_parent(0)\n", "    pass\n"),
        ("a parent that is gone is not noticed", "if os.getppid() != int(first):", "if False:"),
        ("a parent is inherited", "return int(first) if own == str(os.getpid()) else 0", "return int(first)"),
        ("no parent is known", "    os.environ[PARENT] = f\"{first}:{os.getpid()}\"\n", ""),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_the_first_that_is_asked_counts",
        ("the last that is asked counts", "if self.asked is not None or signum not in (*_signals(), LOST):", "if signum not in (*_signals(), LOST):"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_news_are_waited_for_after_a_collective_has_failed",
        ("nothing is waited for", "        until = time.monotonic() + 1.0\n        while self._line", "        until = time.monotonic()\n        while self._line"),
        ("news are waited for alone", "while self._line is not None and self._thread and self.asked is None:", "while self._line is None and self.asked is None:"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_one_process_says_that_the_first_was_lost",
        ("everybody says it", "speaks = self.rank == (1 if 0 in self._gone else 0) and not self._said", "speaks = not self._said"),
        ("nobody says that process 0 is lost", "(1 if 0 in self._gone else 0)", "0"),
        ("who is gone is not noted", "                self._gone.append(rank)\n", "                pass\n"),
        ("no advice", "            words.append(self.advice())\n", "            pass\n"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_who_swallows_a_stop_is_ended "
        f"{_ORDERS}::test_a_second_interrupt_ends_a_round_at_once",
        ("nobody is ended", "if now >= self._end_at or interrupts > 1:", "if interrupts > 1:"),
        ("a second interrupt is one of many", "if now >= self._end_at or interrupts > 1:", "if now >= self._end_at:"),
        ("ended without a status", "        os._exit(self.status)\n", "        os._exit(0)\n"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_who_is_told_by_another_is_interrupted",
        ("the main thread is never interrupted", "signal.pthread_kill(self._main, signal.SIGTERM)", "pass"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_a_round_is_not_waited_for_longer_than_promised",
        ("rounds are waited for", "        self._end_at = now + wait + LAST_CALL\n", "        self._end_at = now + 9 * wait + LAST_CALL\n"),
        ("rounds are cut short", "PATIENCE = 5.0", "PATIENCE = 1.0"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_a_child_that_is_sent_a_signal_while_it_is_made_asks_nothing_of_the_run",
        ("signals while a child is made", "signal.pthread_sigmask(signal.SIG_BLOCK, _signals() if len(_ACTIVE) else [])", "signal.pthread_sigmask(signal.SIG_BLOCK, [])"),
        ("children let go before they forget", "    for stop in list(_ACTIVE):\n        stop._forget()\n    _let_go_of_signals()", "    _let_go_of_signals()\n    for stop in list(_ACTIVE):\n        stop._forget()"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_LIFELINE}::test_a_forked_child_answers_signals_as_before "
        f"{_LIFELINE}::test_a_childs_own_signals_are_not_heard_by_the_run "
        f"{_LIFELINE}::test_only_the_outermost_end_hands_signals_back "
        f"{_LIFELINE}::test_signals_are_handed_back_and_those_ignored_stay_so",
        ("children keep the run's handlers", "        signal.set_wakeup_fd(-1)\n        for signum, handler in self._before.items():\n            signal.signal(signum, handler)", "        signal.set_wakeup_fd(-1)"),
        ("children keep the run's pipe", "        signal.set_wakeup_fd(-1)\n        for signum", "        for signum"),
        ("children keep signals for later", "        stop._forget()\n    _let_go_of_signals()", "        stop._forget()"),
        ("parents keep signals for later", "    after_in_parent=_let_go_of_signals,\n", ""),
        ("signals stay taken over", "        _ACTIVE.discard(self)\n        for signum, handler in self._before.items():\n            signal.signal(signum, handler)", "        _ACTIVE.discard(self)"),
        ("the pipe stays", "        signal.set_wakeup_fd(self._wakeup_before)\n", "        pass\n"),
        ("ignored signals are taken", "if signal.getsignal(signum) is not signal.SIG_IGN or signum == signal.SIGTERM:", "if signum:"),
        ("an inner end hands back", "if self._depth == 0 and not (", "if not ("),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_LIFELINE}::test_outside_the_main_thread_nothing_is_taken_over",
        ("other threads take over", "if self._depth == 1 and threading.get_ident() == self._main:", "if self._depth == 1:"),
    ),
    *group(
        "fl_lightning/processes/stopping.py",
        f"{_ORDERS}::test_an_error_of_the_run_stays_one",
        ("a failure is called a stop", "        \"\"\"The run ends by an error of its own, which is explained elsewhere.\"\"\"\n        self._said = True\n", "        \"\"\"The run ends by an error of its own, which is explained elsewhere.\"\"\"\n        self._say()\n"),
    ),
]  # fmt: skip

LINES = group(
    "fl_lightning/processes/lifeline.py",
    f"{_LIFELINE}::test_a_word_to_process_0_and_from_it_to_all "
    f"{_LIFELINE}::test_an_end_is_a_loss_unless_it_was_said",
    ("strangers are let in", "if secrets.compare_digest(hello[:_TOKEN], token) and len(hello) == _TOKEN + _RANK:", "if len(hello) == _TOKEN + _RANK:"),
    ("one peer is told", "        for peer in self.sockets:\n", "        for peer in self.sockets[:1]:\n"),
    ("an end is not heard", "            if not words:\n                heard.append((rank, None))\n", ""),
    ("an end that was said is a loss", "if not words or DONE in words:", "if not words:"),
    ("lines stay open", "        for rank in list(self._peers):\n            self._drop(rank)", "        for rank in list(self._peers)[1:]:\n            self._drop(rank)"),
)  # fmt: skip

ERRORS = [
    *group(
        "fl_lightning/processes/launching.py",
        f"{_ORDERS}::test_an_error_of_a_stop_ends_the_run_by_its_status "
        f"{_ORDERS}::test_an_error_of_the_run_stays_one "
        f"{_ORDERS}::test_who_ends_well_is_no_loss",
        ("what a stop has caused is an error", "isinstance(error, Stopped) or bool(stop.asked)", "isinstance(error, Stopped)"),
        ("a lost process is an error", "    return lost or isinstance", "    return isinstance"),
        ("every error is a stop", "            if not _is_stop(error, stop):\n", "            if False:\n"),
        ("a stop ends well", "raise SystemExit(stop.finish()) from None", "stop.finish()"),
        ("the end is a loss", "            raise SystemExit(stop.finish()) from None\n        stop.part()", "            raise SystemExit(stop.finish()) from None"),
        ("work goes on after a stop", "    if _is_stop(error, stop):\n        raise Stopped", "    if False:\n        raise Stopped"),
    ),
    *group(
        "fl_lightning/output/checkpoint.py",
        f"{_ORDERS}::test_a_round_that_was_asked_to_stop_is_saved_and_the_last",
        ("rounds go on after a stop", "        stop.check()\n", ""),
        ("a stop has no checkpoint", "any(processes_of(trainer).together(lambda: stop.asked is not None))", "False"),
    ),
]  # fmt: skip

GOING_ON = [
    *group(
        "fl_lightning/command/restarts.py",
        _AUTO,
        ("releases are begun anew", "        if _lines(folder / name) > 1:\n", "        if False:\n"),
        ("a header is a release", "if _lines(folder / name) > 1:", "if _lines(folder / name) > 0:"),
        ("a single release is begun anew", "if _lines(folder / name) > 1:", "if _lines(folder / name) > 2:"),
        ("a checkpoint is not taken", "    if (folder / CHECKPOINT).exists():\n", "    if False:\n"),
        ("everything goes on", "    if ckpt_path != AUTO and not (ckpt_path is None and again):\n", "    if ckpt_path != AUTO and ckpt_path is not None:\n"),
        ("no folder is needed", "    if run_dir is None:\n        raise", "    if False:\n        raise"),
    ),
    *group(
        "fl_lightning/command/restarts.py",
        f"{_ORDERS}::test_rounds_without_noise_are_not_begun_anew_either",
        ("rounds without noise are begun anew", "for name in (FILE_NAME, \"rounds.csv\"):", "for name in (FILE_NAME,):"),
    ),
    *group(
        "fl_lightning/command/restarts.py",
        _SLURM,
        ("a job that was put back starts", "and not (ckpt_path is None and again)", "and ckpt_path is not None"),
        ("another checkpoint is not taken", "not (ckpt_path is None and again):", "not again:"),
        ("commands share a folder", "\"\\0\".join(arguments).encode()", "b\"\""),
        ("jobs share a folder", "f\"slurm-{slurm.job()}-{_name(arguments)}\"", "f\"slurm-{_name(arguments)}\""),
    ),
    *group(
        "fl_lightning/processes/slurm.py",
        _SLURM,
        ("every job was put back", "not in (\"\", \"0\")", "not in (\"\",)"),
        ("tasks of an array are one job", "return f\"{array}_{task}\" if array and task else", "return"),
        ("a shell is a job", "not in (\"bash\", \"interactive\")", "not in ()"),
        ("a failed requeue is one", "timeout=_WAIT, check=True", "timeout=_WAIT, check=False"),
        ("no scheduler is a crash", "except (OSError, subprocess.SubprocessError) as error:", "except subprocess.SubprocessError as error:"),
    ),
]  # fmt: skip

MUTATIONS = [*ORDERS, *LINES, *ERRORS, *GOING_ON]
