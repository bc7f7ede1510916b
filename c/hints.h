/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What the kernel tells by itself of a change that may be one of taps: programs loaded and
 * unloaded, network devices and their queues made and removed.  None of it is more than a reason
 * to look; what was told can be lost, and may be about something else.
 *
 * As in shim.h: 0 or a negative errno; what a function gives comes last.
 */
#ifndef QS_HINTS_H
#define QS_HINTS_H

#include <stddef.h>
#include <stdint.h>

/* BPF programs: PERF_RECORD_BPF_EVENT of every CPU, from Linux 5.1; takes CAP_PERFMON */

struct qs_bpf_event {
	uint32_t unload; /* 1: gone; 0: loaded */
	uint32_t id;	 /* of the program; some kernels before 6.2 say 0 of one that is gone */
};

struct qs_bpf_events;
/* fd becomes readable with the first event; it is for epoll only, and closed by qs_bpf_events_close(). */
int qs_bpf_events_open(struct qs_bpf_events **events, int *fd);
/* Take what was told, oldest first of each CPU; lost is 1 if there was more than that. */
int qs_bpf_events_read(struct qs_bpf_events *events, struct qs_bpf_event *into, size_t room,
		       size_t *count, int *lost);
void qs_bpf_events_close(struct qs_bpf_events *events);

/* Network devices: the kernel's uevents, which reach the device's own network namespace only */

/*
 * A socket in the namespace of netns_fd, or (-1) this thread's own.  The namespace lives on while
 * the socket does.  A thread that could not return to its own namespace ends the process.
 */
int qs_uevents_open(int netns_fd, int *fd);
/* Take what was told, at most QS_UEVENTS_AT_ONCE; hint is 1 if any of it was about a network device. */
#define QS_UEVENTS_AT_ONCE 256
int qs_uevents_read(int fd, int *hint);

#endif
