// Sets aside the macros that other headers are known to define with names that are words elsewhere.
// Every public header begins with this file and ends with macros_on.hpp, so that it and what it
// includes mean what they say whatever was included before, and whoever includes it keeps his
// macros. Included many times, each time to do it again.

// Qt
#pragma push_macro("emit")
#undef emit
#pragma push_macro("slots")
#undef slots
#pragma push_macro("signals")
#undef signals
#pragma push_macro("foreach")
#undef foreach
#pragma push_macro("forever")
#undef forever

// windows.h
#pragma push_macro("min")
#undef min
#pragma push_macro("max")
#undef max
#pragma push_macro("small")
#undef small
#pragma push_macro("near")
#undef near
#pragma push_macro("far")
#undef far
#pragma push_macro("interface")
#undef interface
#pragma push_macro("IN")
#undef IN
#pragma push_macro("OUT")
#undef OUT
#pragma push_macro("OPTIONAL")
#undef OPTIONAL
#pragma push_macro("ERROR")
#undef ERROR
#pragma push_macro("DELETE")
#undef DELETE

// X11
#pragma push_macro("Success")
#undef Success
#pragma push_macro("Status")
#undef Status
#pragma push_macro("None")
#undef None
#pragma push_macro("Bool")
#undef Bool
#pragma push_macro("True")
#undef True
#pragma push_macro("False")
#undef False
#pragma push_macro("Always")
#undef Always
#pragma push_macro("Above")
#undef Above
#pragma push_macro("Below")
#undef Below
#pragma push_macro("Complex")
#undef Complex
#pragma push_macro("Convex")
#undef Convex
#pragma push_macro("Unsorted")
#undef Unsorted

// macOS
#pragma push_macro("check")
#undef check
#pragma push_macro("verify")
#undef verify
#pragma push_macro("require")
#undef require
#pragma push_macro("nil")
#undef nil

// Arduino
#pragma push_macro("abs")
#undef abs
#pragma push_macro("round")
#undef round
#pragma push_macro("sq")
#undef sq
#pragma push_macro("bit")
#undef bit
#pragma push_macro("word")
#undef word
#pragma push_macro("F")
#undef F
#pragma push_macro("PI")
#undef PI
#pragma push_macro("radians")
#undef radians
#pragma push_macro("degrees")
#undef degrees
#pragma push_macro("constrain")
#undef constrain
#pragma push_macro("HIGH")
#undef HIGH
#pragma push_macro("LOW")
#undef LOW

// C and POSIX
#pragma push_macro("I")
#undef I
#pragma push_macro("index")
#undef index
#pragma push_macro("border")
#undef border
#pragma push_macro("major")
#undef major
#pragma push_macro("minor")
#undef minor
