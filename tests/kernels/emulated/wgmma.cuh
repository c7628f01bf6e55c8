// What stands for kernels/cuda/wgmma.cuh on a CPU: the same functions.
//
// A product reads its operands, and writes its sums, at a drawn time from its issue to the wait that covers it, most
// often at the end. The variables of operand A must live, and keep their values, as long. Sums are kept apart: the
// variables that stand for them hold no number until `hold`, which fails before that wait.
//
// Each warp does its 16 rows by itself, as far ahead of the other three as it may come; that all four have issued
// the same products is looked at when the block has ended.

#pragma once
#include "ptx.cuh"

constexpr u32 NO_SUM = 0x7FBADBAD;  // NaN, and as an integer larger than any sum

DEVICE u32 x_descriptor(u32 at) {
  if (at % 1024) fail("a swizzled operand that does not begin at a multiple of 1024 bytes");
  return at >> 4 | 1 << 16;
}

inline Products& products_of_warp() { return this_emulated_block->products[this_fiber->thread / 32]; }

DEVICE void settle(u32 (&)[4]) {}

DEVICE void wgmma_begin() {
  by_warp([](Fiber**) { products_of_warp().has_begun = true; });
}

DEVICE void wgmma_commit() {
  by_warp([](Fiber**) {
    products_of_warp().num_committed++;
    products_of_warp().has_begun = false;
  });
}

template <int LEFT>
DEVICE void wgmma_wait() {
  by_warp([](Fiber**) { products_of_warp().wait_for(products_of_warp().num_committed - LEFT); });
}

DEVICE void converged() { __syncwarp(); }

DEVICE void barrier_wait_whole(u32 bar, u32 parity) { barrier_wait(bar, parity); }

template <int LEFT>
DEVICE void give_registers() {}
template <int ALL>
DEVICE void take_registers() {}

// 16 bytes of a row of 128: bits 7 to 9 of an address are added to bits 4 to 6, without carry.
inline const u8* swizzled(Block& block, u32 at) { return shared_at(block, at ^ at / 128 % 8 * 16, 16); }

// d = a b, or d += a b, of a warp's 16 rows: operands as of `product` in ptx.cuh, but for b.
template <class Value, bool KEEP, class Sum, int TILES, class OfLeft, class OfRight>
inline void warpgroup_product(Sum (&d)[TILES][4], const u32 (&a)[4], u32 b, const OfLeft& of_left,
                              const OfRight& of_right) {
  constexpr int PACKED = std::is_same_v<Value, double> ? 2 : 4, COLUMNS = PACKED * 8;
  u32* const words = (u32*)d;
  const auto found = this_fiber->sums.find(d);
  const bool is_new = !KEEP || found == this_fiber->sums.end();
  if (is_new) this_fiber->sums[d] = {std::vector<u32>(words, words + TILES * 4), 0};
  for (int i = 0; i < TILES * 4; i++) {
    if (!is_new && words[i] != NO_SUM) fail("sums of products that are overwritten, and not held before");
    words[i] = NO_SUM;
  }
  u64* const operands = this_fiber->operands;
  operands[0] = (u64)&this_fiber->sums[d], operands[1] = (u64)a, operands[2] = b;
  by_warp([=](Fiber** lanes) {
    Block* const block = this_emulated_block;
    Products& products = products_of_warp();
    if (!products.has_begun) fail("a product without wgmma_begin");
    const u32 first = b % (1 << 14) * 16;
    if (b >> 14 != 4) fail("a descriptor that is none of x_descriptor's");
    if (first % 128 + 32 > 128 || first / 128 % 8) fail("an operand across the end of its rows");
    std::vector<Sums*> sums;
    std::vector<const u32*> registers;
    for (int l = 0; l < 32; l++) {
      sums.push_back((Sums*)lanes[l]->operands[0]);
      sums.back()->last_group = products.num_committed;
      registers.push_back((const u32*)lanes[l]->operands[1]);
      if (lanes[l]->operands[2] != b) fail("lanes that do not describe the same operand");
    }
    const auto compute = [=]() {
      Value left[16][COLUMNS];
      for (int l = 0; l < 32; l++) {
        for (int i = 0; i < PACKED * 4; i++) {
          const int r = i / PACKED, col = l % 4 * PACKED + i % PACKED + r / 2 * COLUMNS / 2;
          left[l / 4 + r % 2 * 8][col] = of_left(registers[l][r] >> i % PACKED * (32 / PACKED));
        }
      }
      for (int token = 0; token < TILES * 8; token++) {
        Value right[COLUMNS];
        for (int k = 0; k < COLUMNS; k++) {
          const u32 byte = k * (4 / PACKED);
          u32 word = 0;
          memcpy(&word, swizzled(*block, first + token * 128 + byte / 16 * 16) + byte % 16, 4 / PACKED);
          right[k] = of_right(word);
        }
        for (int row = 0; row < 16; row++) {
          u32& word = sums[row % 8 * 4 + token % 8 / 2]->words[token / 8 * 4 + row / 8 * 2 + token % 2];
          const Sum before = KEEP ? bits_of<Sum>(word) : 0;
          word = bits_of<u32>(added(before, left[row], right));
        }
      }
    };
    products.under_way.push_back({products.num_committed, compute});
    products.operands.push_back({products.num_committed, first / 128 * 128, first / 128 * 128 + TILES * 1024});
    products.issued.push_back(b | (u64)(TILES * 8 + PACKED) << 32 | (u64)KEEP << 48);
    while (!products.under_way.empty() && block->draw() % 4 == 0) products.compute_first();
  });
}

// The sums of products are read, or written otherwise, from here on.
template <class Sum, int TILES>
inline void hold(Sum (&d)[TILES][4]) {
  const auto found = this_fiber->sums.find(d);
  if (found == this_fiber->sums.end()) return;
  if (found->second.last_group >= products_of_warp().num_awaited) fail("sums of products that are under way");
  memcpy(d, found->second.words.data(), sizeof d);
  this_fiber->sums.erase(found);
}

inline double bf16_value(u32 bits) { return bf16_to_float(bits & 0xFFFF); }
inline int signed_byte(u32 bits) { return (signed char)bits; }
inline int unsigned_byte(u32 bits) { return (u8)bits; }

template <bool KEEP, int TILES>
DEVICE void wgmma_bf16(float (&d)[TILES][4], const u32 (&a)[4], u32 b) {
  warpgroup_product<double, KEEP>(d, a, b, bf16_value, bf16_value);
}

template <bool KEEP, int TILES>
DEVICE void wgmma_s8(int (&d)[TILES][4], const u32 (&a)[4], u32 b) {
  warpgroup_product<int, KEEP>(d, a, b, signed_byte, signed_byte);
}

template <bool KEEP, int TILES>
DEVICE void wgmma_u8s8(int (&d)[TILES][4], const u32 (&a)[4], u32 b) {
  warpgroup_product<int, KEEP>(d, a, b, unsigned_byte, signed_byte);
}
