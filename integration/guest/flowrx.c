/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * flowrx: on which queue of a device was every single flow seen?
 *
 *     flowrx DEV QUEUES FLOWS WANTED ROUND WINDOW QUIET_MS
 *
 * Theory of operation
 * -------------------
 * A packet socket does not tell the queue of a packet, but a classic BPF filter can read it
 * (SKF_AD_QUEUE).  So there is one packet socket per queue, each with a filter that takes this
 * queue's packets only; the socket that a packet comes out of is then its queue, exactly and per
 * packet.  Nothing is averaged and no counter is compared.
 *
 * What the filter reads is skb->queue_mapping.  A receiving driver records queue q as q + 1
 * (skb_record_rx_queue), so that 0 means "not recorded"; on its way out of a device a packet
 * carries the transmit queue q itself.  The packet's type tells the two apart.  So the same program
 * follows flows in the guest (receive queue) and on the host's side of the tap (the transmit queue,
 * which is the guest's receive queue as the host chose it).
 *
 * A frame of ours ends in 16 bytes: the magic, the round and the flow number, both big-endian.  The
 * round keeps a straggler of an earlier run out of this one.
 *
 * Output: "ready" once every socket listens; "+N" whenever N, the number of flows seen, reaches a
 * multiple of WINDOW (the sender's permission to go on); at the end, after WANTED flows or QUIET_MS
 * without a packet of ours, "flows PACKETS DROPS STRING": the packets of ours that were read, those
 * that the sockets lost, and for each flow its queue as a hexadecimal digit, '.' if it was not seen
 * and '!' if it was seen on several queues.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_QUEUES 16
#define MAX_FLOWS (1 << 20)
#define RECEIVE_BUFFER (16 << 20)

struct trailer {
	char magic[8];
	uint32_t round;
	uint32_t flow;
};

_Static_assert(sizeof(struct trailer) == 16, "as traffic.py writes it");

static const char magic[8] = { 'q', 's', 't', 'e', 'e', 'r', 'r', 'x' };

static void die(const char *what)
{
	fprintf(stderr, "flowrx: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int open_queue(unsigned int ifindex, unsigned int queue)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_PKTTYPE),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 0, 2),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_QUEUE),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, queue, 2, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_QUEUE),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, queue + 1, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0xffff),
		BPF_STMT(BPF_RET | BPF_K, 0),
	};
	struct sock_fprog filter = { .len = sizeof(code) / sizeof(code[0]), .filter = code };
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET,
		.sll_protocol = htons(ETH_P_ALL),
		.sll_ifindex = (int)ifindex,
	};
	int room = RECEIVE_BUFFER;
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		die("packet socket");
	if (setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof(filter)))
		die("SO_ATTACH_FILTER");
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)))
		die("SO_RCVBUFFORCE");
	/* Protocol 0 until here: nothing is received before the filter is in place. */
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("bind");
	return fd;
}

static unsigned long number(const char *text, unsigned long least, unsigned long most)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (!*text || *end || value < least || value > most) {
		fprintf(stderr, "flowrx: %s is not in the range %lu to %lu\n", text, least, most);
		exit(2);
	}
	return value;
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Everything that one socket holds; the number of flows that had not been seen before. */
static unsigned long drain(int fd, char digit, uint32_t round, unsigned long flows, char *seen,
			   unsigned long *packets)
{
	unsigned char frame[2048];
	unsigned long fresh = 0;
	struct trailer trailer;
	ssize_t length;

	while ((length = recv(fd, frame, sizeof(frame), MSG_TRUNC)) >= 0) {
		uint32_t flow;

		if ((size_t)length < sizeof(trailer) || (size_t)length > sizeof(frame))
			continue;
		memcpy(&trailer, frame + length - sizeof(trailer), sizeof(trailer));
		flow = ntohl(trailer.flow);
		if (memcmp(trailer.magic, magic, sizeof(magic)) || ntohl(trailer.round) != round ||
		    flow >= flows)
			continue;
		(*packets)++;
		fresh += seen[flow] == '.';
		if (seen[flow] == '.')
			seen[flow] = digit;
		else if (seen[flow] != digit)
			seen[flow] = '!';
	}
	if (errno != EAGAIN && errno != EINTR)
		die("recv");
	return fresh;
}

int main(int argc, char **argv)
{
	struct pollfd sockets[MAX_QUEUES];
	unsigned long queues, flows, wanted, round, window, quiet_ms, i;
	unsigned long packets = 0, found = 0, told = 0, drops = 0;
	unsigned int ifindex;
	long long last;
	char *seen;

	if (argc != 8) {
		fprintf(stderr, "usage: flowrx DEV QUEUES FLOWS WANTED ROUND WINDOW QUIET_MS\n");
		return 2;
	}
	ifindex = if_nametoindex(argv[1]);
	if (!ifindex)
		die(argv[1]);
	queues = number(argv[2], 1, MAX_QUEUES);
	flows = number(argv[3], 1, MAX_FLOWS);
	wanted = number(argv[4], 1, flows);
	round = number(argv[5], 0, UINT32_MAX);
	window = number(argv[6], 1, MAX_FLOWS);
	quiet_ms = number(argv[7], 1, 600000);
	seen = malloc(flows + 1);
	if (!seen)
		die("malloc");
	memset(seen, '.', flows);
	seen[flows] = '\0';

	for (i = 0; i < queues; i++)
		sockets[i] = (struct pollfd){ .fd = open_queue(ifindex, i), .events = POLLIN };
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("ready\n");

	last = now_ms();
	while (found < wanted) {
		long long left = last + (long long)quiet_ms - now_ms();
		unsigned long before = packets;

		if (left <= 0)
			break;
		if (poll(sockets, queues, (int)left) < 0 && errno != EINTR)
			die("poll");
		for (i = 0; i < queues; i++)
			found += drain(sockets[i].fd, "0123456789abcdef"[i], round, flows, seen,
				       &packets);
		if (packets != before)
			last = now_ms();
		for (; told + window <= found; told += window)
			printf("+%lu\n", told + window);
	}

	for (i = 0; i < queues; i++) {
		struct tpacket_stats lost;
		socklen_t size = sizeof(lost);

		if (getsockopt(sockets[i].fd, SOL_PACKET, PACKET_STATISTICS, &lost, &size))
			die("PACKET_STATISTICS");
		drops += lost.tp_drops;
	}
	printf("flows %lu %lu %s\n", packets, drops, seen);
	free(seen);
	return 0;
}
