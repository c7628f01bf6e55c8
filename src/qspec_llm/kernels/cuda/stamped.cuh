// Values that the blocks of one kernel hand to each other, each with a stamp that tells when it was written.
//
// A reader asks for a value until its stamp is the awaited one. That is one way to the L2 and one look there;
// a count that all blocks wait for costs the writer a fence and the reader two looks more. A reader loads 16
// bytes, a piece, at a time; what is stamped together is stored by one instruction, of at most 8 bytes for
// each stamp, which arrive whole:
//
//   word   a bf16 value in the upper half, the stamp in the lower
//   pair   4 bytes of anything, then the stamp
//
// A stamp has 16 bits. Every word and pair is written anew at every stamp, so only the stamp before can be
// found instead. A value that is written at stamp n + 1 must have been read by all who wanted that of n.

#pragma once
#include "ptx.cuh"

// {value, stamp}
DEVICE void store_pair(void* to, u32 value, u32 stamp) { store_relaxed(to, make_uint2(value, stamp)); }

// {a, stamp, b, stamp}
DEVICE void store_pairs(void* to, u32 a, u32 b, u32 stamp) {
  store_relaxed_halves(to, make_uint4(a, stamp, b, stamp));
}

// Four words of two pairs of bf16.
DEVICE void store_words(void* to, u32 first, u32 second, u32 stamp) {
  store_relaxed_words(to, make_uint4(first << 16 | stamp, (first & 0xFFFF0000u) | stamp,
                                     second << 16 | stamp, (second & 0xFFFF0000u) | stamp));
}

DEVICE uint4 load_pairs(const void* from) { return load_relaxed_halves(from); }

DEVICE uint4 load_words(const void* from) { return load_relaxed_words(from); }

DEVICE uint2 load_pair(const void* from) { return load_relaxed_pair(from); }

DEVICE bool is_word_of(u32 v, u32 stamp) { return ((v ^ stamp) & 0xFFFF) == 0; }

DEVICE bool are_words_of(const uint4& v, u32 stamp) {
  return (((v.x ^ stamp) | (v.y ^ stamp) | (v.z ^ stamp) | (v.w ^ stamp)) & 0xFFFF) == 0;
}

DEVICE bool are_pairs_of(const uint4& v, u32 stamp) { return v.y == stamp && v.w == stamp; }

// The values of four words, and of eight, as pairs of bf16.
DEVICE uint2 values_of_words(const uint4& v) {
  return make_uint2(permute(v.x, v.y, 0x7632), permute(v.z, v.w, 0x7632));
}

DEVICE uint4 values_of_words(const uint4& a, const uint4& b) {
  const uint2 first = values_of_words(a), second = values_of_words(b);
  return make_uint4(first.x, first.y, second.x, second.y);
}

// Calls `look`, which says whether it found what it wants, until it did. Stops the kernel where that takes
// seconds: a block is lost.
template <class Look>
DEVICE void look_until_found(const Look& look) {
#pragma unroll 1
  for (u32 tries = 0; tries < 1u << 23; tries++) {
    if (look()) return;
  }
  __trap();
}
