# SPDX-License-Identifier: BSD-2-Clause
"""The tests of tests/kernel that run under every kernel of the table, by what they prove there."""

from dataclasses import dataclass

ENVIRONMENT = {"QSTEER_STRICT": "1", "QSTEER_PACKETS": "3000", "QSTEER_UNLOAD_TUN": "1"}
"""A test that cannot run fails; fewer packets, for a processor that is emulated; nobody has a tap there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """``name`` is what the tests prove, for docs/support.md; ``tests`` are node ids of pytest.

    ``quick``: worth the time on one kernel whenever all tests run.
    """

    name: str
    tests: tuple[str, ...]
    quick: bool = False


def _of(module: str, *names: str) -> tuple[str, ...]:
    """The node ids of some tests of a module."""
    return tuple(f"tests/kernel/{module}.py::{name}" for name in names)


PARTS = (
    Part(
        name="both builds load; or what is missing is named, and the complete one takes over",
        tests=("tests/kernel/test_builds.py",),
        quick=True,
    ),
    Part(
        name="known and random packets: each build gives the reference's queue, in test runs and on a tap",
        tests=_of(
            "test_program",
            "test_golden_packets",
            "test_random_packets",
            "test_on_a_tap",
            "test_the_verifier_has_room",
            "test_the_complete_build_takes_no_perfmon",
        ),
        quick=True,
    ),
    Part(
        name="VLANs through a bridge, headers outside of the linear area, hostile maps, no body, other sockets",
        tests=_of(
            "test_program",
            "test_vlan_through_a_bridge",
            "test_headers_outside_of_the_linear_area",
            "test_nothing_is_read_on_a_unix_socket",
            "test_nothing_is_read_on_a_udp_socket",
            "test_on_a_packet_socket",
            "test_hostile_maps",
            "test_queues_beyond_a_byte",
            "test_what_is_frozen_stays_so",
            "test_two_taps_with_one_ifindex",
            "test_what_is_loaded_says_who_it_is",
            "test_the_body_is_gone",
            "test_flows_are_spread_without_the_body",
        ),
    ),
    Part(
        name="queues of a tap: open, hand over, copy (pidfd_getfd), attach, read back by the iterator",
        tests=("tests/kernel/test_shim.py",),
        quick=True,
    ),
    Part(
        name="status: every tap of every network namespace, who holds it and what steers it",
        tests=("tests/kernel/test_inventory.py",),
    ),
    Part(
        name="tun as a module: its own BTF is used, and named where it is missing",
        tests=_of(
            "test_module",
            "test_status_reads_by_the_modules_own_btf",
            "test_the_modules_file_in_sysfs_is_not_needed",
            "test_a_kernel_without_btf",
            "test_a_module_without_btf",
            "test_module_btf_takes_a_capability",
        ),
    ),
    Part(
        name="tun unloaded and loaded again under status, keep and monitor",
        tests=_of(
            "test_module",
            "test_this_process_looks_at_the_module_that_is_there",
            "test_keep_and_monitor_outlive_the_module",
            "test_a_device_node_that_comes_late",
            "test_the_module_comes_and_goes_while_a_process_looks",
        ),
    ),
    Part(
        name="apply and off in another process's tap, over anybody's maps; undone where a step fails",
        tests=(
            "tests/kernel/test_execute.py",
            *_of("test_undo", "test_each_call_in_turn[attach-fails]", "test_each_call_in_turn[replace-fails]"),
        ),
    ),
    Part(
        name="every change is seen: digests, hints (perf, uevents, pidfd), holds",
        tests=_of(
            "test_signals",
            "test_digest_changes_with_all_that_counts",
            "test_digest_of_a_tap_that_comes_and_goes",
            "test_digest_sees_a_queue_that_is_not_in_use_closed",
            "test_digest_of_an_unheld_tap_in_another_namespace",
            "test_digests_stay_while_nothing_changes",
            "test_digest_is_the_same_from_every_namespace",
            "test_holders_digest_changes_with_who_holds_a_queue",
            "test_a_holder_that_becomes_another_program_is_seen",
            "test_an_attachment_that_replaces_another_is_never_at_its_address",
            "test_the_same_program_taken_off_and_attached_within_milliseconds",
            "test_without_rights_the_digest_says_so",
            "test_a_change_is_reported_within_a_second",
            "test_what_the_kernel_tells_is_reported_at_once",
            "test_a_tap_that_comes_is_reported_at_once",
            "test_a_queue_handed_to_another_process_is_seen",
            "test_a_change_between_two_waits_is_not_lost",
            "test_a_hold_put_and_removed",
            "test_a_process_that_is_gone_already_is_a_change_once",
            "test_a_namespace_is_not_kept_alive",
            "test_bpf_events_tell_of_programs",
            "test_lost_bpf_events_are_told",
            "test_uevents_are_the_kernels",
            "test_a_flood_of_uevents_is_told_as_a_loss",
            "test_uevents_of_a_process_that_is_gone",
        ),
    ),
    Part(
        name="the command line from nothing to steered and back, and what it refuses",
        tests=_of(
            "test_cli",
            "test_from_nothing_to_steered_and_back",
            "test_a_foreign_program_stays_unless_told",
            "test_a_tap_in_another_network_namespace",
            "test_without_rights",
        ),
    ),
    Part(
        name="keep and monitor, as the unit file leaves them too",
        tests=_of(
            "test_keep",
            "test_a_program_that_was_removed_is_put_back",
            "test_monitor_tells_the_same_and_changes_nothing",
            "test_it_works_as_the_unit_file_leaves_it",
            "test_a_shared_body_that_is_lost_is_mended",
        ),
    ),
)
