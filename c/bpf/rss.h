/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Receive-side scaling as virtio 1.2, 5.1.6.4.3 ("Hash calculation for incoming packets") has it.
 *
 * Theory of operation
 *
 * qs_classify() turns a packet into the Toeplitz input: five 64-bit words, big-endian bytes as
 * numbers, zeroes behind the end.  What becomes of it is toeplitz.h's.
 *
 * What a packet has, and has not:
 *  - up to two VLAN tags (802.1Q, 802.1ad); a third makes it unclassified;
 *  - a fragment, and a packet whose TCP or UDP header is cut short, has addresses only;
 *  - a packet whose IP header is cut short is unclassified;
 *  - IPv6 extension headers are followed for QS_EXT_HEADERS headers, and QS_EXT_OPTIONS options
 *    in each destination options header; behind that there is no transport header.
 *
 * The packet is read through qs_load(), which reader_*.h provide: it fails, and reads nothing, unless
 * every byte asked for belongs to the packet.  qs_has() only tells that.  A place in the packet is a
 * number, offset from a start that the verifier does not know: it would follow each offset.
 */
#ifndef QS_RSS_H
#define QS_RSS_H

#include "abi.h"
#include "toeplitz.h"

#define QS_ETH_P_IP 0x0800
#define QS_ETH_P_8021Q 0x8100
#define QS_ETH_P_IPV6 0x86dd
#define QS_ETH_P_8021AD 0x88a8

#define QS_IPPROTO_HOPOPTS 0
#define QS_IPPROTO_TCP 6
#define QS_IPPROTO_UDP 17
#define QS_IPPROTO_ROUTING 43
#define QS_IPPROTO_FRAGMENT 44
#define QS_IPPROTO_AH 51
#define QS_IPPROTO_DSTOPTS 60

#define QS_OPT_PAD1 0
#define QS_OPT_HOME_ADDRESS 0xc9

#define QS_EXT_HEADERS 16
#define QS_EXT_OPTIONS 32
/* Headers, options, the end of each header's options, and the last header. */
#define QS_EXT_STEPS (QS_EXT_HEADERS * (QS_EXT_OPTIONS + 2) + 1)

#define QS_WORDS 5

#define QS_HASH_EX (QS_HASH_IP_EX | QS_HASH_TCP_EX | QS_HASH_UDP_EX)

/* A byte of a word in memory. */
#define QS_BYTE(i, value) bpf_cpu_to_be64((__u64)(value) << (56 - 8 * (i)))

#define QS_IP4_PLAIN 0x45	    /* version 4, 20 bytes */
#define QS_IP4_FRAGMENT_BITS 0x3fff /* more fragments, or an offset */

/* The last two bytes of a word in memory, to compare with bpf_htons(). */
static __always_inline __u16 qs_last16(__u64 word)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	return word >> 48;
#else
	return word;
#endif
}

/* Of a VLAN; proto is in network order. */
static __always_inline int qs_is_tag(__u16 proto)
{
	return proto == bpf_htons(QS_ETH_P_8021Q) || proto == bpf_htons(QS_ETH_P_8021AD);
}

/* The first 64 bits of a key as QEMU keeps it: 32 of them are a number of the host's. */
static __always_inline __u64 qs_key_head(__u64 raw)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	return raw << 32 | bpf_ntohl(raw >> 32);
#else
	return raw;
#endif
}

/* The windows of a key as QEMU keeps it, or (few) those for 12 bytes. */
static __always_inline void qs_key_windows(const volatile __u64 *key, int few,
					   __u64 window[QS_WINDOWS])
{
	__u64 word = qs_key_head(key[0]), next = bpf_be64_to_cpu(key[1]);

	window[0] = QS_WINDOW(0, word, next);
	word = bpf_be64_to_cpu(key[2]);
	window[1] = QS_WINDOW(1, next, word);
	if (few)
		return;
	next = bpf_be64_to_cpu(key[3]);
	window[2] = QS_WINDOW(2, word, next);
	word = bpf_be64_to_cpu(key[4]);
	window[3] = QS_WINDOW(3, next, word);
	window[4] = QS_WINDOW(4, word, 0ULL);
}

static __always_inline __u16 qs_be16(const void *p)
{
	return bpf_ntohs(*(const __u16 *)p);
}

/* Source and destination port at the top of a word, or a negative value: no such header. */
static __always_inline int qs_ports(struct qs_reader *r, __u64 at, __u32 proto, __u64 *word)
{
	__u32 ports;

	if (proto != QS_IPPROTO_TCP && proto != QS_IPPROTO_UDP)
		return -1;
	if (!qs_has(r, at, proto == QS_IPPROTO_TCP ? 20 : 8) || qs_load(r, at, &ports, 4))
		return -1;
	*word = (__u64)bpf_ntohl(ports) << 32;
	return 0;
}

static __always_inline int qs_classify_ip4(struct qs_reader *r, __u64 at, __u32 types,
					   __u64 word[QS_WORDS])
{
	__u8 ip[20] __attribute__((aligned(8)));
	__u32 proto, wanted;

	if (qs_load(r, at, ip, sizeof(ip)))
		return -1;
	if ((ip[0] >> 4) != 4 || (ip[0] & 0xf) < 5)
		return -1;
	word[0] = (__u64)bpf_ntohl(*(__u32 *)(ip + 12)) << 32 | bpf_ntohl(*(__u32 *)(ip + 16));
	word[1] = word[2] = word[3] = word[4] = 0;

	proto = ip[9];
	wanted = proto == QS_IPPROTO_TCP ? types & QS_HASH_TCP4 :
		 proto == QS_IPPROTO_UDP ? types & QS_HASH_UDP4 :
					   0;
	/* more fragments, or an offset */
	if (wanted && !(qs_be16(ip + 6) & QS_IP4_FRAGMENT_BITS) &&
	    !qs_ports(r, at + (ip[0] & 0xf) * 4, proto, &word[1]))
		return 0;
	return types & QS_HASH_IP4 ? 0 : -1;
}

/*
 * A walk over extension headers.  What has not been seen is at the packet's start, and counters begin
 * there: the verifier goes through every combination of numbers that it knows.
 */
struct qs_ip6_walk {
	const struct qs_reader *r;
	__u64 at;	   /* of the header, or the option, that comes next */
	__u64 options_end; /* of the destination options that at is in */
	__u64 fragment;
	__u64 home, via; /* of addresses to take instead of the source, the destination */
	__u64 headers, options;
	/* 64 bits of their own, each: 6.1 stores nothing narrow beside what was kept there. */
	__u64 next; /* the header's protocol number */
	__u64 types;
};

static __always_inline int qs_is_extension(__u32 next)
{
	return next == QS_IPPROTO_HOPOPTS || next == QS_IPPROTO_ROUTING ||
	       next == QS_IPPROTO_FRAGMENT || next == QS_IPPROTO_DSTOPTS || next == QS_IPPROTO_AH;
}

/* Nonzero: no more options. */
static __always_inline int qs_ip6_option(struct qs_ip6_walk *w)
{
	__u8 head[2] __attribute__((aligned(2)));
	__u64 at = w->at;

	/* what is one byte short can only be padding, or cut */
	if (w->options - w->r->start >= QS_EXT_OPTIONS || at + 2 > w->options_end ||
	    qs_load(w->r, at, head, 2))
		return 1;
	w->options++;
	if (head[0] == QS_OPT_PAD1) {
		w->at = at + 1;
		return 0;
	}
	at += 2;
	w->at = at + head[1];
	if (w->at > w->options_end)
		return 1;
	if (head[0] != QS_OPT_HOME_ADDRESS || head[1] != 16)
		return 0;
	if (qs_has(w->r, at, 16))
		w->home = at;
	return 1;
}

/* Nonzero: no more headers. */
static __always_inline int qs_ip6_header(struct qs_ip6_walk *w)
{
	__u64 at = w->at;
	__u32 next = w->next, len;
	__u8 head[8] __attribute__((aligned(8)));

	if (!qs_is_extension(next))
		return 1;
	if (w->headers - w->r->start >= QS_EXT_HEADERS || qs_load(w->r, at, head, sizeof(head)))
		return 1;
	w->headers++;
	w->next = head[0];
	len = (head[1] + 1) * 8;
	if (next == QS_IPPROTO_DSTOPTS && (w->types & QS_HASH_EX)) {
		w->options_end = at + len;
		w->options = w->r->start;
		w->at = at + 2;
		return 0;
	}
	if (next == QS_IPPROTO_FRAGMENT) {
		len = 8;
		w->fragment = at;
		/* what follows in a later fragment is payload */
		if (qs_be16(head + 2) & 0xfff8)
			return 1;
	} else if (next == QS_IPPROTO_AH) {
		len = (head[1] + 2) * 4;
	} else if (next == QS_IPPROTO_ROUTING && head[2] == 2 && head[1] == 2) {
		if (qs_has(w->r, at + 8, 16))
			w->via = at + 8;
	}
	w->at = at + len;
	return 0;
}

/*
 * One header or one option.  They take turns in one loop, since the verifier goes through a loop in a
 * loop very often.
 */
static __always_inline int qs_ip6_step(struct qs_ip6_walk *w)
{
	/* all of it stays where it is, instead of a second time where the compiler keeps what it read */
	asm volatile("" ::: "memory");
	if (w->options_end == w->r->start)
		return qs_ip6_header(w);
	if (qs_ip6_option(w)) {
		w->at = w->options_end;
		w->options_end = w->r->start;
	}
	return 0;
}

static long qs_ip6_loop(__u32 i, void *ctx)
{
	return qs_ip6_step(ctx);
}

/* Take an address if there is one. */
static __always_inline void qs_ip6_address(const struct qs_reader *r, __u64 at, __u64 word[2])
{
	__u64 address[2];

	if (at == r->start || qs_load(r, at, address, sizeof(address)))
		return;
	word[0] = bpf_be64_to_cpu(address[0]);
	word[1] = bpf_be64_to_cpu(address[1]);
}

static __always_inline int qs_classify_ip6(struct qs_reader *r, __u64 at, __u32 types,
					   __u64 word[QS_WORDS])
{
	__u8 ip[8] __attribute__((aligned(8)));
	struct qs_ip6_walk w;
	__u32 tcp, udp;

	if (qs_load(r, at, ip, sizeof(ip)) || qs_load(r, at + 8, word, 32))
		return -1;
	if ((ip[0] >> 4) != 6)
		return -1;
	for (int i = 0; i < 4; i++)
		word[i] = bpf_be64_to_cpu(word[i]);
	word[4] = 0;

	w.r = r;
	w.at = at + 40;
	w.next = ip[6];
	w.types = types;
	w.options_end = w.fragment = w.home = w.via = w.headers = w.options = r->start;
	asm volatile("" ::: "memory");
	/* Most have one header and one option; a turn of the loop costs two calls. */
	if (!qs_ip6_step(&w) && !qs_ip6_step(&w))
		bpf_loop(QS_EXT_STEPS, qs_ip6_loop, &w, 0);

	asm volatile("" ::: "memory");
	tcp = w.next == QS_IPPROTO_TCP;
	udp = w.next == QS_IPPROTO_UDP;
	if (w.fragment != r->start || qs_ports(r, w.at, w.next, &word[4]))
		tcp = udp = 0;

	if (qs_is_extension(ip[6]) && (types & QS_HASH_EX)) {
		int ex = 1;

		if (tcp && (types & QS_HASH_TCP_EX))
			;
		else if (udp && (types & QS_HASH_UDP_EX))
			;
		else if (types & QS_HASH_IP_EX)
			word[4] = 0;
		else
			ex = 0;
		if (ex) {
			qs_ip6_address(r, w.home, word);
			qs_ip6_address(r, w.via, word + 2);
			return 0;
		}
	}
	if (tcp && (types & QS_HASH_TCP6))
		return 0;
	if (udp && (types & QS_HASH_UDP6))
		return 0;
	word[4] = 0;
	return types & QS_HASH_IP6 ? 0 : -1;
}

/* 0 and the Toeplitz input, or a negative value: no hash type that is enabled applies. */
static __always_inline int qs_classify(struct __sk_buff *skb, struct qs_reader *r, __u32 types,
				       __u64 word[QS_WORDS])
{
	__u64 at = r->start + 12;
	__u32 proto;
	__u16 be;

	if (qs_load(r, at, &be, sizeof(be)))
		return -1;
	proto = bpf_ntohs(be);
	for (int tags = 0; tags < 2; tags++) {
		if (proto != QS_ETH_P_8021Q && proto != QS_ETH_P_8021AD)
			break;
		/* the first of three tags may travel outside of the packet's data */
		if (tags == 1 && skb->vlan_present)
			return -1;
		at += 4;
		if (qs_load(r, at, &be, sizeof(be)))
			return -1;
		proto = bpf_ntohs(be);
	}
	if (proto == QS_ETH_P_IP)
		return qs_classify_ip4(r, at + 2, types, word);
	if (proto == QS_ETH_P_IPV6)
		return qs_classify_ip6(r, at + 2, types, word);
	return -1;
}

#endif
