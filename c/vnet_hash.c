// SPDX-License-Identifier: BSD-2-Clause
#define _GNU_SOURCE
#include "vnet_hash.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/if.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "auto.h"

/* v3 to v11 */
struct qs_vnet_hash3 {
	__u16 flags;
	__u8 pad[2];
	__u32 types;
};
#define QS_HASH3_REPORT 0x0001
#define QS_HASH3_RSS 0x0002
#define QS_TUNGETVNETHASHCAP _IOR('T', 228, struct qs_vnet_hash3)
#define QS_TUNSETVNETHASH _IOW('T', 229, struct qs_vnet_hash3)

/* With QS_HASH3_RSS this follows, then the table and the key. */
struct qs_vnet_rss3 {
	__u16 indirection_table_mask;
	__u16 unclassified_queue;
};

/* v12: the table and the key follow.  Its setters really are _IOR. */
struct qs_vnet_rss12 {
	__u32 hash_types;
	__u16 indirection_table_mask;
	__u16 unclassified_queue;
};
#define QS_TUNGETVNETHASHTYPES _IOR('T', 228, __u32)
#define QS_TUNSETVNETREPORTINGAUTOMQ _IOR('T', 229, __u32)
#define QS_TUNSETVNETREPORTINGRSS _IOR('T', 230, struct qs_vnet_rss12)
#define QS_TUNSETVNETRSS _IOR('T', 231, struct qs_vnet_rss12)

_Static_assert(QS_TUNGETVNETHASHCAP == 0x800854e4, "v3 to v11");
_Static_assert(QS_TUNSETVNETHASH == 0x400854e5, "v3 to v11");
_Static_assert(QS_TUNGETVNETHASHTYPES == 0x800454e4, "v12");
_Static_assert(QS_TUNSETVNETREPORTINGAUTOMQ == 0x800454e5, "v12");
_Static_assert(QS_TUNSETVNETREPORTINGRSS == 0x800854e6, "v12");
_Static_assert(QS_TUNSETVNETRSS == 0x800854e7, "v12");

#define QS_TABLE_AND_KEY (2 * QS_TABLE_ENTRIES + QS_KEY_BYTES)

static int qs_ioctl(int fd, unsigned long request, void *argument)
{
	return ioctl(fd, request, argument) < 0 ? -errno : 0;
}

int qs_vnet_can(int fd, struct qs_vnet_can *can)
{
	/* Whatever another kernel means by the number, it writes no more than the word says. */
	struct qs_vnet_hash3 hash3 = {};
	__u32 types = 0;
	int err;

	err = qs_ioctl(fd, QS_TUNGETVNETHASHTYPES, &types);
	if (!err) {
		*can = (struct qs_vnet_can){
			.abi = QS_VNET_ABI_12, .types = types, .rss = 1, .report = 1
		};
		return 0;
	}
	err = qs_ioctl(fd, QS_TUNGETVNETHASHCAP, &hash3);
	if (!err)
		*can = (struct qs_vnet_can){ .abi = QS_VNET_ABI_3,
					     .types = hash3.types,
					     .rss = !!(hash3.flags & QS_HASH3_RSS),
					     .report = !!(hash3.flags & QS_HASH3_REPORT) };
	return err;
}

int qs_vnet_rss(int fd, __u32 abi, const struct qs_rss_config *config, const __u8 *key,
		const __u16 *table, int report)
{
	unsigned char message[sizeof(struct qs_vnet_hash3) + sizeof(struct qs_vnet_rss3) +
			      QS_TABLE_AND_KEY];
	size_t head = 0, entries = config->indirections_len;
	unsigned long request;

	if (!entries || entries > QS_TABLE_ENTRIES)
		return -EINVAL;
	if (abi == QS_VNET_ABI_12) {
		struct qs_vnet_rss12 rss = { .hash_types = config->hash_types,
					     .indirection_table_mask = entries - 1,
					     .unclassified_queue = config->default_queue };

		memcpy(message, &rss, head = sizeof(rss));
		request = report ? QS_TUNSETVNETREPORTINGRSS : QS_TUNSETVNETRSS;
	} else if (abi == QS_VNET_ABI_3) {
		struct qs_vnet_hash3 hash = { .flags =
						      QS_HASH3_RSS | (report ? QS_HASH3_REPORT : 0),
					      .types = config->hash_types };
		struct qs_vnet_rss3 rss = { .indirection_table_mask = entries - 1,
					    .unclassified_queue = config->default_queue };

		memcpy(message, &hash, sizeof(hash));
		memcpy(message + sizeof(hash), &rss, sizeof(rss));
		head = sizeof(hash) + sizeof(rss);
		request = QS_TUNSETVNETHASH;
	} else {
		return -EINVAL;
	}
	memcpy(message + head, table, 2 * entries);
	memcpy(message + head + 2 * entries, key, QS_KEY_BYTES);
	return qs_ioctl(fd, request, message);
}

int qs_vnet_automq(int fd, __u32 abi, __u32 types)
{
	struct qs_vnet_hash3 hash = { .flags = types ? QS_HASH3_REPORT : 0, .types = types };

	if (abi == QS_VNET_ABI_12)
		return qs_ioctl(fd, QS_TUNSETVNETREPORTINGAUTOMQ, &types);
	return abi == QS_VNET_ABI_3 ? qs_ioctl(fd, QS_TUNSETVNETHASH, &hash) : -EINVAL;
}

/*
 * The probe.  All of it is a child's, which calls nothing but the kernel: what it opens goes with it,
 * and what an unknown kernel may make of these numbers is the child's own trouble.
 */

#define QS_QUEUES 3
#define QS_HEADER 20 /* struct virtio_net_hdr_v1_hash */
#define QS_ETH_TEST 0x9000
#define QS_FRAME 80
#define QS_SAME_PACKET_MS 200
#define QS_PROBE_MS 1500
#define QS_REAP_MS 500

/* The key of the Toeplitz verification suite. */
const __u8 qs_vnet_probe_key[QS_KEY_BYTES] = {
	0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3,
	0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3,
	0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
};

const __u16 qs_vnet_probe_table[QS_VNET_PROBE_ENTRIES] = { 3, 4 };

/* Packets whose hashes are known, and what VIRTIO_NET_HASH_REPORT_* calls them. */
static const struct qs_known {
	__u16 protocol;
	__u16 report;
	__u32 hash;
} qs_known[] = {
	{ QS_ETH_TEST, 0, 0 },	       /* no hash type matches */
	{ ETH_P_IP, 2, 0xfb63539a },   /* TCP, 172.17.0.0:9 to 172.17.0.1:9 */
	{ ETH_P_IPV6, 4, 0xd6eb560f }, /* protocol 253, ffff::ac11:0 to ffff::ac11:1 */
};

struct qs_tap {
	int fds[QS_QUEUES];
	int packets; /* an AF_PACKET socket */
	int ifindex;
};

static void qs_frame(const struct qs_known *known, __u8 frame[QS_FRAME])
{
	static const __u8 ip4[] = { 0x45, 0,  0, 40, 0,	  0,  0, 0, 64, 6, 0, 0,
				    172,  17, 0, 0,  172, 17, 0, 1, 0,	9, 0, 9 };
	static const __u8 ip6[] = { 0x60, 0, 0, 0, 0, 8, 253, 64, 0xff, 0xff };
	__u8 *ip = frame + ETH_HLEN;

	memset(frame, 0, QS_FRAME);
	memcpy(frame, "\x02qsdst\x02qssrc", 2 * ETH_ALEN);
	frame[12] = known->protocol >> 8;
	frame[13] = known->protocol & 0xff;
	if (known->protocol == ETH_P_IP) {
		memcpy(ip, ip4, sizeof(ip4));
		ip[20 + 12] = 5 << 4; /* 20 bytes of TCP header */
	} else if (known->protocol == ETH_P_IPV6) {
		memcpy(ip, ip6, sizeof(ip6));
		memcpy(ip + 8 + 12, "\xac\x11\x00\x00", 4);
		memcpy(ip + 24, "\xff\xff", 2);
		memcpy(ip + 24 + 12, "\xac\x11\x00\x01", 4);
	}
}

static int qs_make_tap(struct qs_tap *tap)
{
	struct ifreq ifr = { .ifr_name = "qsteer-probe",
			     .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE };
	int size = QS_HEADER, little = 1, control, err;

	for (int i = 0; i < QS_QUEUES; i++) {
		tap->fds[i] = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
		if (tap->fds[i] < 0)
			return -errno;
		if ((err = qs_ioctl(tap->fds[i], TUNSETIFF, &ifr)))
			return err;
	}
	if ((err = qs_ioctl(tap->fds[0], TUNSETVNETHDRSZ, &size)) ||
	    (err = qs_ioctl(tap->fds[0], TUNSETVNETLE, &little)))
		return err;
	control = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0); /* any will do */
	tap->packets = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
	if (control < 0 || tap->packets < 0)
		return -errno;
	if ((err = qs_ioctl(control, SIOCGIFINDEX, &ifr)))
		return err;
	tap->ifindex = ifr.ifr_ifindex;
	ifr.ifr_flags = IFF_UP | IFF_NOARP;
	return qs_ioctl(control, SIOCSIFFLAGS, &ifr);
}

/* Send one packet to the guest that there is not; -ENOMSG if it does not come out. */
static int qs_send(const struct qs_tap *tap, const struct qs_known *known, int *queue,
		   __u8 header[QS_HEADER])
{
	struct sockaddr_ll to = { .sll_family = AF_PACKET,
				  .sll_protocol = htons(known->protocol),
				  .sll_ifindex = tap->ifindex };
	struct pollfd ready[QS_QUEUES];
	__u8 frame[QS_FRAME], got[QS_HEADER + QS_FRAME + 1];

	qs_frame(known, frame);
	if (sendto(tap->packets, frame, QS_FRAME, 0, (void *)&to, sizeof(to)) < 0)
		return -errno;
	for (int i = 0; i < QS_QUEUES; i++)
		ready[i] = (struct pollfd){ .fd = tap->fds[i], .events = POLLIN };
	while (poll(ready, QS_QUEUES, QS_SAME_PACKET_MS) > 0) {
		for (int i = 0; i < QS_QUEUES; i++) {
			if (!(ready[i].revents & POLLIN))
				continue;
			/* Where nothing is reported, tun may leave the end of the header alone. */
			memset(got, 0, sizeof(got));
			/* The kernel sends some of its own: to find routers, say. */
			if (read(tap->fds[i], got, sizeof(got)) != QS_HEADER + QS_FRAME ||
			    memcmp(got + QS_HEADER, frame, QS_FRAME))
				continue;
			*queue = i;
			memcpy(header, got, QS_HEADER);
			return 0;
		}
	}
	return -ENOMSG;
}

static void qs_config(const struct qs_vnet_probe *found, __u16 unclassified,
		      struct qs_rss_config *config)
{
	*config = (struct qs_rss_config){ .hash_types = found->can.types,
					  .indirections_len = 2,
					  .default_queue = unclassified };
}

/* Whether the known packets come out where they should; with report, their headers count, too. */
static bool qs_is_right(const struct qs_tap *tap, const struct qs_vnet_probe *found,
			const __u16 table[2], __u16 unclassified, bool report)
{
	struct qs_rss_config config;

	qs_config(found, unclassified, &config);
	if (qs_vnet_rss(tap->fds[0], found->can.abi, &config, qs_vnet_probe_key, table, report))
		return false;
	for (size_t i = 0; i < sizeof(qs_known) / sizeof(*qs_known); i++) {
		const struct qs_known *known = &qs_known[i];
		__u16 wanted = known->report ? table[known->hash & 1] : unclassified;
		__u8 header[QS_HEADER];
		__u32 hash;
		__u16 told;
		int queue;

		if (qs_send(tap, known, &queue, header) || queue != wanted % QS_QUEUES)
			return false;
		hash = header[12] | header[13] << 8 | header[14] << 16 | (__u32)header[15] << 24;
		told = header[16] | header[17] << 8;
		if (hash != (report ? known->hash : 0) || told != (report ? known->report : 0))
			return false;
	}
	return true;
}

/* A steering program that answers with one queue. */
static int qs_answering(int queue)
{
	struct bpf_insn insns[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = queue },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attr = { .prog_type = BPF_PROG_TYPE_SOCKET_FILTER,
				.insn_cnt = 2,
				.insns = (__u64)(unsigned long)insns,
				.license = (__u64)(unsigned long)"Dual BSD/GPL" };
	int fd = syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr));

	return fd < 0 ? -errno : fd;
}

/*
 * Whether RSS and a program refuse each other, in either order; or the program goes before RSS.
 * -ENOTSUP for anything else.
 */
static int qs_beside_program(const struct qs_tap *tap, struct qs_vnet_probe *found)
{
	static const __u16 table[2] = { 0, 1 };
	__u8 header[QS_HEADER];
	struct qs_rss_config config;
	int prog, none = -1, fd = tap->fds[0], queue, err;

	qs_config(found, 0, &config);
	prog = qs_answering(2);
	if (prog < 0)
		return prog;
	if ((err = qs_vnet_rss(fd, found->can.abi, &config, qs_vnet_probe_key, table, 0)))
		return err;
	err = qs_ioctl(fd, TUNSETSTEERINGEBPF, &prog);
	if (!err) {
		for (size_t i = 0; i < sizeof(qs_known) / sizeof(*qs_known); i++)
			if (qs_send(tap, &qs_known[i], &queue, header) || queue != 2)
				return -ENOTSUP;
		if (qs_vnet_rss(fd, found->can.abi, &config, qs_vnet_probe_key, table, 0))
			return -ENOTSUP;
		return qs_ioctl(fd, TUNSETSTEERINGEBPF, &none);
	}
	if (err != -EBUSY)
		return -ENOTSUP;
	if (qs_vnet_automq(fd, found->can.abi, 0) || qs_ioctl(fd, TUNSETSTEERINGEBPF, &prog) ||
	    qs_vnet_rss(fd, found->can.abi, &config, qs_vnet_probe_key, table, 0) != -EBUSY)
		return -ENOTSUP;
	found->exclusive = 1;
	return qs_ioctl(fd, TUNSETSTEERINGEBPF, &none);
}

/* Whether RSS is off again: nothing is reported any more. */
static bool qs_is_off(const struct qs_tap *tap, __u32 abi)
{
	static const __u8 nothing[QS_HEADER - 12];
	__u8 header[QS_HEADER];
	int queue;

	return !qs_vnet_automq(tap->fds[0], abi, 0) &&
	       !qs_send(tap, &qs_known[1], &queue, header) &&
	       !memcmp(header + 12, nothing, sizeof(nothing));
}

static int qs_probe_all(struct qs_vnet_probe *found)
{
	static const __u16 other[2] = { 5, 3 };
	const __u16 *one = qs_vnet_probe_table;
	struct qs_rss_config config;
	int small = 12, err;
	struct qs_tap tap;

	if (unshare(CLONE_NEWNET) < 0)
		return -errno;
	if ((err = qs_make_tap(&tap)))
		return err;
	/* Two tables, each of which leads to all three queues: chance gives 1 of 729. */
	found->steers = qs_is_right(&tap, found, one, 5, false) &&
			qs_is_right(&tap, found, other, 4, false);
	if (!found->steers)
		return 0;
	found->reports = found->can.report && qs_is_right(&tap, found, other, 4, true);
	found->steers = qs_is_off(&tap, found->can.abi);
	err = qs_beside_program(&tap, found);
	if (err == -EPERM || err == -EACCES)
		return err;
	if (err)
		found->steers = 0;
	qs_config(found, 0, &config);
	if (found->can.abi == QS_VNET_ABI_3 && !qs_ioctl(tap.fds[0], TUNSETVNETHDRSZ, &small))
		found->strict = qs_vnet_rss(tap.fds[0], found->can.abi, &config, qs_vnet_probe_key,
					    one, 1) == -EBUSY;
	/* For the other side to look at. */
	return qs_vnet_rss(tap.fds[0], found->can.abi, &config, qs_vnet_probe_key, one, 0);
}

struct qs_probed {
	int err;
	struct qs_vnet_probe found;
};

static int qs_ask(struct qs_vnet_can *can)
{
	qs_auto_close int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
	int err;

	if (fd < 0)
		return -errno;
	err = qs_vnet_can(fd, can);
	/* Some types, all of them virtio's: else it is an answer to another question. */
	if (err || !can->rss || !can->types || can->types & ~QS_HASH_ALL)
		return -EOPNOTSUPP;
	return 0;
}

/* What was inherited, taps among it, is not to be held; but for two of them. */
static void qs_close_others(int one, int other)
{
	unsigned int low = one < other ? one : other, high = one < other ? other : one;

	syscall(SYS_close_range, 3U, low - 1, 0U);
	if (high > low + 1)
		syscall(SYS_close_range, low + 1, high - 1, 0U);
	syscall(SYS_close_range, high + 1, ~0U, 0U);
}

static void qs_probe_child(pid_t parent, int answer, int hold)
{
	struct qs_probed probed = {};
	struct pollfd ended = { .fd = hold };

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_IGN);
	if (getppid() != parent)
		_exit(1);
	qs_close_others(answer, hold);
	probed.err = qs_ask(&probed.found.can);
	if (!probed.err)
		probed.err = qs_probe_all(&probed.found);
	if (write(answer, &probed, sizeof(probed)) == sizeof(probed) && !probed.err)
		poll(&ended, 1, QS_PROBE_MS);
	_exit(0);
}

static long qs_milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int qs_vnet_probe_start(struct qs_vnet_probing *probing, struct qs_vnet_probe *found)
{
	qs_auto_close int answer = -1, tell = -1, hold = -1, held = -1;
	long deadline = qs_milliseconds() + QS_PROBE_MS, left;
	struct qs_probed probed = { .err = -ETIMEDOUT };
	pid_t parent;
	int fds[2];

	if (pipe2(fds, O_CLOEXEC) < 0)
		return -errno;
	answer = fds[0];
	tell = fds[1];
	if (pipe2(fds, O_CLOEXEC) < 0)
		return -errno;
	held = fds[0];
	hold = fds[1];
	parent = getpid();
	probing->pid = fork();
	if (probing->pid < 0)
		return -errno;
	if (!probing->pid) {
		close(hold);
		qs_probe_child(parent, tell, held);
	}
	close(qs_take(&tell));
	probing->answer = qs_take(&answer);
	probing->hold = qs_take(&hold);
	while ((left = deadline - qs_milliseconds()) > 0) {
		struct pollfd ready = { .fd = probing->answer, .events = POLLIN };

		if (poll(&ready, 1, left) > 0) {
			if (read(probing->answer, &probed, sizeof(probed)) != sizeof(probed))
				probed.err = -EIO;
			break;
		}
	}
	if (probed.err)
		qs_vnet_probe_end(probing);
	else
		*found = probed.found;
	return probed.err;
}

void qs_vnet_probe_end(struct qs_vnet_probing *probing)
{
	static const struct timespec moment = { .tv_nsec = 1000000 };
	long deadline = qs_milliseconds() + QS_REAP_MS;

	close(probing->hold);
	close(probing->answer);
	/* Not yet waited for, so that the number is no other's, unless SIGCHLD is ignored. */
	if (waitpid(probing->pid, NULL, WNOHANG) == 0)
		kill(probing->pid, SIGKILL);
	/* One that the kernel does not let go is waited for by nobody: it must not hold a host up. */
	while (waitpid(probing->pid, NULL, WNOHANG) == 0 && qs_milliseconds() < deadline)
		nanosleep(&moment, NULL);
}
