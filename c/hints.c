// SPDX-License-Identifier: BSD-2-Clause
#define _GNU_SOURCE
#include "hints.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* BPF programs */

/* One page holds 170 records.  PERF_RECORD_BPF_EVENT, without sample_id: */
struct qs_bpf_record {
	struct perf_event_header header;
	__u16 type;
	__u16 flags;
	__u32 id;
	__u8 tag[8];
};

_Static_assert(sizeof(struct qs_bpf_record) == 24, "as linux/perf_event.h describes it");

struct qs_ring {
	int fd;
	struct perf_event_mmap_page *page; /* followed by the page of data */
};

struct qs_bpf_events {
	int epoll;
	size_t page_size;
	size_t count;
	struct qs_ring rings[];
};

static int qs_ring_open(struct qs_bpf_events *events, int cpu)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_SOFTWARE,
		.config = PERF_COUNT_SW_DUMMY,
		.size = sizeof(attr),
		.bpf_event = 1,
		.watermark = 1,
		.wakeup_watermark = 1,
	};
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = events->count };
	struct qs_ring ring;
	int err;

	ring.fd = syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC);
	if (ring.fd < 0)
		return -errno;
	ring.page =
		mmap(NULL, 2 * events->page_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, 0);
	if (ring.page != MAP_FAILED) {
		if (!epoll_ctl(events->epoll, EPOLL_CTL_ADD, ring.fd, &event)) {
			events->rings[events->count++] = ring;
			return 0;
		}
		err = -errno;
		munmap(ring.page, 2 * events->page_size);
	} else {
		err = -errno;
	}
	close(ring.fd);
	return err;
}

int qs_bpf_events_open(struct qs_bpf_events **out, int *fd)
{
	long cpus = sysconf(_SC_NPROCESSORS_CONF);
	struct qs_bpf_events *events;
	int err = 0;

	if (cpus < 1)
		return -EINVAL;
	events = calloc(1, sizeof(*events) + cpus * sizeof(events->rings[0]));
	if (!events)
		return -ENOMEM;
	events->page_size = sysconf(_SC_PAGESIZE);
	events->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (events->epoll < 0)
		err = -errno;
	for (int cpu = 0; !err && cpu < cpus; cpu++) {
		err = qs_ring_open(events, cpu);
		if (err == -ENODEV) /* this CPU is offline */
			err = 0;
	}
	if (!err && !events->count)
		err = -ENODEV;
	if (err) {
		qs_bpf_events_close(events);
		return err;
	}
	*fd = events->epoll;
	*out = events;
	return 0;
}

void qs_bpf_events_close(struct qs_bpf_events *events)
{
	for (size_t i = 0; i < events->count; i++) {
		munmap(events->rings[i].page, 2 * events->page_size);
		close(events->rings[i].fd);
	}
	if (events->epoll >= 0)
		close(events->epoll);
	free(events);
}

/* A CPU that went offline reports a hang-up, again and again. */
static void qs_forget_offline(struct qs_bpf_events *events)
{
	struct epoll_event ready[64];
	int count = epoll_wait(events->epoll, ready, 64, 0);

	for (int i = 0; i < count; i++) {
		if (ready[i].events & (EPOLLHUP | EPOLLERR))
			epoll_ctl(events->epoll, EPOLL_CTL_DEL, events->rings[ready[i].data.u64].fd,
				  NULL);
	}
}

static void qs_ring_copy(const struct qs_bpf_events *events, const struct qs_ring *ring,
			 uint64_t from, void *to, size_t len)
{
	const char *data = (const char *)ring->page + events->page_size;
	size_t at = from % events->page_size, first = events->page_size - at;

	if (first > len)
		first = len;
	memcpy(to, data + at, first);
	memcpy((char *)to + first, data, len - first);
}

struct qs_taken {
	struct qs_bpf_event *into;
	size_t room, count;
	int lost;
};

static void qs_ring_read(const struct qs_bpf_events *events, const struct qs_ring *ring,
			 struct qs_taken *taken)
{
	uint64_t head = __atomic_load_n(&ring->page->data_head, __ATOMIC_ACQUIRE);
	uint64_t tail = ring->page->data_tail;

	/* The kernel tells what it lost only with the next record that it has room for. */
	if (head - tail > events->page_size - sizeof(struct qs_bpf_record))
		taken->lost = 1;
	while (head - tail >= sizeof(struct perf_event_header)) {
		struct qs_bpf_record record = {};

		qs_ring_copy(events, ring, tail, &record.header, sizeof(record.header));
		if (record.header.size < sizeof(record.header) || record.header.size > head - tail)
			break;
		if (record.header.type == PERF_RECORD_LOST)
			taken->lost = 1;
		if (record.header.type == PERF_RECORD_BPF_EVENT &&
		    record.header.size >= sizeof(record)) {
			qs_ring_copy(events, ring, tail, &record, sizeof(record));
			if (taken->count == taken->room)
				taken->lost = 1;
			else
				taken->into[taken->count++] = (struct qs_bpf_event){
					.unload = record.type == PERF_BPF_EVENT_PROG_UNLOAD,
					.id = record.id,
				};
		}
		tail += record.header.size;
	}
	__atomic_store_n(&ring->page->data_tail, head, __ATOMIC_RELEASE);
}

/*
 * All rings are looked at, whichever are said to be readable: perf's poll answers once for each
 * wake-up, and who has asked for another reason has taken the answer.
 */
int qs_bpf_events_read(struct qs_bpf_events *events, struct qs_bpf_event *into, size_t room,
		       size_t *count, int *lost)
{
	struct qs_taken taken = { .into = into, .room = room };

	qs_forget_offline(events);
	for (size_t i = 0; i < events->count; i++)
		qs_ring_read(events, &events->rings[i], &taken);
	*count = taken.count;
	*lost = taken.lost;
	return 0;
}

/* Network devices */

static int qs_uevents_socket(int *fd)
{
	/* lib/kobject_uevent.c sends to the first group. */
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 };
	int sock =
		socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
	int err;

	if (sock < 0)
		return -errno;
	if (bind(sock, (struct sockaddr *)&address, sizeof(address)) < 0) {
		err = -errno;
		close(sock);
		return err;
	}
	*fd = sock;
	return 0;
}

int qs_uevents_open(int netns_fd, int *fd)
{
	int own, err;

	if (netns_fd < 0)
		return qs_uevents_socket(fd);
	own = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	if (own < 0)
		return -errno;
	if (setns(netns_fd, CLONE_NEWNET) < 0) {
		err = -errno;
		close(own);
		return err;
	}
	err = qs_uevents_socket(fd);
	if (setns(own, CLONE_NEWNET) < 0) {
		/* Whatever it did next would be done to the wrong namespace. */
		perror("qsteer: cannot return to its own network namespace");
		abort();
	}
	close(own);
	return err;
}

int qs_uevents_read(int fd, int *hint)
{
	int found = 0;

	for (int i = 0; i < QS_UEVENTS_AT_ONCE; i++) {
		char message[4096];
		struct sockaddr_nl sender = {};
		socklen_t len = sizeof(sender);
		ssize_t n = recvfrom(fd, message, sizeof(message) - 1, 0,
				     (struct sockaddr *)&sender, &len);

		if (n < 0 && errno == ENOBUFS) {
			found = 1; /* some were lost */
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno != EAGAIN)
			return -errno;
		if (n < 0)
			break;
		if (len < sizeof(sender) || sender.nl_pid)
			continue; /* not the kernel's */
		/* "add@/devices/virtual/net/tap0/queues/rx-3", and more strings behind it */
		message[n] = '\0';
		if (strstr(message, "/net/"))
			found = 1;
	}
	*hint = found;
	return 0;
}
