/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Receive-side scaling as virtio 1.2, 5.1.6.4.3 ("Hash calculation for incoming packets") has it.
 *
 * Theory of operation
 *
 * qs_classify() turns a packet into the Toeplitz input: five 64-bit words, big-endian bytes as
 * numbers, zeroes behind the end (a zero bit adds nothing to a Toeplitz hash, so no length is
 * needed).  qs_bucket() turns the words and the key into the low seven bits of the hash, which is
 * all that a table of 128 entries uses.
 *
 * A Toeplitz hash is the XOR of the 32-bit windows of the key that start at each set bit of the
 * input.  Seen per output bit: hash bit j (0 = least significant) is the parity of the input ANDed
 * with the key shifted left by 31 - j.  Seven parities over at most 36 bytes replace 288 steps.
 *
 * What a packet has, and has not:
 *  - up to two VLAN tags (802.1Q, 802.1ad); a third makes it unclassified;
 *  - a fragment, and a packet whose TCP or UDP header is cut short, has addresses only;
 *  - a packet whose IP header is cut short is unclassified;
 *  - IPv6 extension headers are followed for QS_EXT_HEADERS headers, and QS_EXT_OPTIONS options
 *    in each destination options header; behind that there is no transport header.
 *
 * The packet is read through qs_load() and qs_load_far(), which reader_*.h provide: they fail, and
 * read nothing, unless every byte asked for belongs to the packet.
 */
#ifndef QS_RSS_H
#define QS_RSS_H

#include "abi.h"

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
#define QS_IPPROTO_NONE 59
#define QS_IPPROTO_DSTOPTS 60

#define QS_OPT_PAD1 0
#define QS_OPT_HOME_ADDRESS 0xc9

#define QS_EXT_HEADERS 16
#define QS_EXT_OPTIONS 32

#define QS_WORDS 5
#define QS_KEY_WORDS (QS_WORDS + 1)

#define QS_HASH_EX (QS_HASH_IP_EX | QS_HASH_TCP_EX | QS_HASH_UDP_EX)

static __always_inline __u16 qs_be16(const void *p)
{
	return bpf_ntohs(*(const __u16 *)p);
}

static __always_inline __u64 qs_be64(const void *p)
{
	return bpf_be64_to_cpu(*(const __u64 *)p);
}

/* Source and destination port at the top of a word, or a negative value: no such header. */
static __always_inline int qs_ports(struct qs_reader *r, __u32 off, __u32 proto, __u64 *word)
{
	__u32 header[5] __attribute__((aligned(8)));

	if (proto == QS_IPPROTO_TCP) {
		if (qs_load(r, off, header, 20))
			return -1;
	} else if (proto == QS_IPPROTO_UDP) {
		if (qs_load(r, off, header, 8))
			return -1;
	} else {
		return -1;
	}
	*word = (__u64)bpf_ntohl(header[0]) << 32;
	return 0;
}

static __always_inline int qs_classify_ip4(struct qs_reader *r, __u32 off, __u32 types,
					   __u64 word[QS_WORDS])
{
	__u8 ip[20] __attribute__((aligned(8)));
	__u32 proto, wanted;

	if (qs_load(r, off, ip, sizeof(ip)))
		return -1;
	if ((ip[0] >> 4) != 4 || (ip[0] & 0xf) < 5)
		return -1;
	word[0] = (__u64)bpf_ntohl(*(__u32 *)(ip + 12)) << 32 | bpf_ntohl(*(__u32 *)(ip + 16));

	proto = ip[9];
	wanted = proto == QS_IPPROTO_TCP ? types & QS_HASH_TCP4 :
		 proto == QS_IPPROTO_UDP ? types & QS_HASH_UDP4 :
					   0;
	/* more fragments, or an offset */
	if (wanted && !(qs_be16(ip + 6) & 0x3fff) &&
	    !qs_ports(r, off + (ip[0] & 0xf) * 4, proto, &word[1]))
		return 0;
	return types & QS_HASH_IP4 ? 0 : -1;
}

struct qs_ip6_walk {
	struct qs_reader r;
	__u32 off;  /* of the header that comes next */
	__u32 next; /* its protocol number */
	__u32 types;
	__u32 seen; /* extension headers there were */
	__u32 no_l4;
	__u32 opt, opt_end;
	__u64 home[2], via[2];
	__u32 has_home, has_via;
};

static long qs_ip6_option(__u32 i, void *ctx)
{
	struct qs_ip6_walk *w = ctx;
	__u32 opt = w->opt;
	__u8 head[2] __attribute__((aligned(2)));

	if (opt >= w->opt_end || qs_load_far(&w->r, opt, head, 1))
		return 1;
	if (head[0] == QS_OPT_PAD1) {
		w->opt = opt + 1;
		return 0;
	}
	if (opt + 2 > w->opt_end || qs_load_far(&w->r, opt, head, 2) ||
	    opt + 2 + head[1] > w->opt_end)
		return 1;
	if (head[0] == QS_OPT_HOME_ADDRESS && head[1] == 16) {
		__u64 home[2];

		if (!qs_load_far(&w->r, opt + 2, home, sizeof(home))) {
			w->home[0] = home[0];
			w->home[1] = home[1];
			w->has_home = 1;
		}
		return 1;
	}
	w->opt = opt + 2 + head[1];
	return 0;
}

static long qs_ip6_header(__u32 i, void *ctx)
{
	struct qs_ip6_walk *w = ctx;
	__u32 off = w->off, next = w->next;
	__u8 head[8] __attribute__((aligned(8)));
	__u32 len;

	if (next != QS_IPPROTO_HOPOPTS && next != QS_IPPROTO_ROUTING &&
	    next != QS_IPPROTO_FRAGMENT && next != QS_IPPROTO_DSTOPTS && next != QS_IPPROTO_AH)
		return 1;
	w->seen = 1;
	if (i >= QS_EXT_HEADERS || qs_load_far(&w->r, off, head, sizeof(head))) {
		w->no_l4 = 1;
		return 1;
	}
	len = (head[1] + 1) * 8;
	if (next == QS_IPPROTO_FRAGMENT) {
		len = 8;
		w->no_l4 = 1;
		/* what follows in a later fragment is payload */
		if (qs_be16(head + 2) & 0xfff8)
			return 1;
	} else if (next == QS_IPPROTO_AH) {
		len = (head[1] + 2) * 4;
	} else if (next == QS_IPPROTO_ROUTING && head[2] == 2 && head[1] == 2) {
		__u64 via[2];

		if (!qs_load_far(&w->r, off + 8, via, sizeof(via))) {
			w->via[0] = via[0];
			w->via[1] = via[1];
			w->has_via = 1;
		}
	} else if (next == QS_IPPROTO_DSTOPTS && (w->types & QS_HASH_EX)) {
		w->opt = off + 2;
		w->opt_end = off + len;
		bpf_loop(QS_EXT_OPTIONS, qs_ip6_option, w, 0);
	}
	w->next = head[0];
	w->off = off + len;
	return 0;
}

static __always_inline int qs_classify_ip6(struct qs_reader *r, __u32 off, __u32 types,
					   __u64 word[QS_WORDS])
{
	__u8 ip[40] __attribute__((aligned(8)));
	__u32 tcp, udp;
	struct qs_ip6_walk w = {};

	if (qs_load(r, off, ip, sizeof(ip)))
		return -1;
	if ((ip[0] >> 4) != 6)
		return -1;
	for (int i = 0; i < 4; i++)
		word[i] = qs_be64(ip + 8 + i * 8);

	w.r = *r;
	w.off = off + 40;
	w.next = ip[6];
	w.types = types;
	if (w.next != QS_IPPROTO_TCP && w.next != QS_IPPROTO_UDP)
		bpf_loop(QS_EXT_HEADERS + 1, qs_ip6_header, &w, 0);

	tcp = w.next == QS_IPPROTO_TCP;
	udp = w.next == QS_IPPROTO_UDP;
	if (w.no_l4 || qs_ports(r, w.off, w.next, &word[4]))
		tcp = udp = 0;

	if (w.seen) {
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
			if (w.has_home) {
				word[0] = qs_be64(&w.home[0]);
				word[1] = qs_be64(&w.home[1]);
			}
			if (w.has_via) {
				word[2] = qs_be64(&w.via[0]);
				word[3] = qs_be64(&w.via[1]);
			}
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
	__u32 off = 12, proto;
	__u16 be;

	if (qs_load(r, off, &be, sizeof(be)))
		return -1;
	proto = bpf_ntohs(be);
	for (int tags = 0; tags < 2; tags++) {
		if (proto != QS_ETH_P_8021Q && proto != QS_ETH_P_8021AD)
			break;
		/* the first of three tags may travel outside of the packet's data */
		if (tags == 1 && skb->vlan_present)
			return -1;
		off += 4;
		if (qs_load(r, off, &be, sizeof(be)))
			return -1;
		proto = bpf_ntohs(be);
	}
	if (proto == QS_ETH_P_IP)
		return qs_classify_ip4(r, off + 2, types, word);
	if (proto == QS_ETH_P_IPV6)
		return qs_classify_ip6(r, off + 2, types, word);
	return -1;
}

/* The low seven bits of the Toeplitz hash; key[QS_WORDS] is 0. */
static __always_inline __u32 qs_bucket(const __u64 word[QS_WORDS], const __u64 key[QS_KEY_WORDS])
{
	__u64 bytes = 0;

#pragma unroll
	for (int j = 0; j < 7; j++) {
		__u64 x = 0;

#pragma unroll
		for (int i = 0; i < QS_WORDS; i++)
			x ^= word[i] & (key[i] << (31 - j) | key[i + 1] >> (33 + j));
		x ^= x >> 32;
		x ^= x >> 16;
		x ^= x >> 8;
		bytes |= (x & 0xff) << (8 * j);
	}
	/* the parity of each byte, in its lowest bit */
	bytes ^= bytes >> 4;
	bytes ^= bytes >> 2;
	bytes ^= bytes >> 1;
	/* byte j's lowest bit becomes bit 56 + j of the product, and nothing carries into them */
	return ((bytes & 0x0101010101010101ULL) * 0x0102040810204080ULL) >> 56;
}

#endif
