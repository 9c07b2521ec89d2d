#!/usr/bin/env bash
# Check a downloaded MovieLens archive in the current directory against its published MD5 sum:
#
#     source verify_dataset.sh [ml-20m|ml-1m]      (or run it; ml-20m unless told)
#
# MOVIELENS_MD5 replaces the sum expected.
# Sourced without a name, it takes the caller's $1, where there is one, for the name.

# All in a subshell, so that whoever sources this keeps their shell as it was, whatever happens.
(
    fail() { echo "verify_dataset.sh: error: $1" >&2; exit 1; }

    name=${1:-ml-20m}
    case $name in
        ml-20m) published=cd245b17a1ae2cc31bb14903e1204af3 ;;
        ml-1m) published=c4d9eecfca2ab87c1945afe126590906 ;;
        *) fail "unknown data set '$name': known are ml-20m and ml-1m" ;;
    esac
    zip=$name.zip
    expected=${MOVIELENS_MD5:-$published}
    [ -f "$zip" ] || fail "$zip is not in this directory: download_dataset.sh $name fetches it"

    # macOS has md5 where Linux has md5sum, which puts a file name behind the sum.
    actual=$(if command -v md5sum > /dev/null; then md5sum; else md5 -q; fi < "$zip") ||
        fail "the MD5 sum of $zip could not be computed"
    actual=${actual%% *}
    [ "$actual" = "$expected" ] || fail "$zip has MD5 $actual, not $expected: delete it and download it again"
    echo "$zip: OK"
)
