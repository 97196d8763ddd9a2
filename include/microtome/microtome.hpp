/// Everything of microtome that needs headers alone. Files other than models (`io/npz.hpp`,
/// `io/png.hpp`) are apart: they need libdeflate and libspng.
#pragma once

#include <microtome/imaging/pipeline.hpp>
#include <microtome/models/sam.hpp>
