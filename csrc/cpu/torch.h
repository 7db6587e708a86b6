// What the files with torch glue need of torch. The first include of each of them, so that a compiler
// that can do so reads these headers once for the whole build (setup.py, `PrecompiledHeader`).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
