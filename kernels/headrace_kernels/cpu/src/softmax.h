// Softmax tile by tile, with a running maximum and sum.
#pragma once
#include "simd.h"

namespace HEADRACE_ISA {

constexpr int TILE = 64;

// Turn `count` scores of a tile [TILE] into weights e^(score * scale - maximum), and those past `count` into zeros.
// Returns what earlier sums shrink by, now that the maximum is another. A tile of nothing above -inf adds nothing.
INLINE float soften(float *scores, int count, float scale, float &greatest_yet, float &total) {
    for (int key = count; key < TILE; key++) scores[key] = -INFINITY;
    float now = greatest_yet;
    for (int key = 0; key < TILE; key += LANES) {
        Lanes at = load(scores + key) * scale;
        store(scores + key, at);
        float here = greatest(at);
        now = here > now ? here : now;
    }
    if (now == -INFINITY) {
        for (int key = 0; key < TILE; key++) {
            if (scores[key] != scores[key]) total = NAN;
            scores[key] = 0.f;
        }
        return 1.f;
    }
    Lanes sum = all(0.f);
    for (int key = 0; key < TILE; key += LANES) {
        Lanes weights = exponential(load(scores + key) + all(-now));
        store(scores + key, weights);
        sum = sum + weights;
    }
    float shrink = exponential(all(greatest_yet - now)).part[0][0];
    total = total * shrink + add_up(sum);
    greatest_yet = now;
    return shrink;
}

}  // namespace HEADRACE_ISA
