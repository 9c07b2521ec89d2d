#!/usr/bin/env bash
# Download a MovieLens archive into the current directory:
#
#     source download_dataset.sh [ml-20m|ml-1m]      (or run it; ml-20m unless told)
#
# A download that was cut off goes on where it stopped. MOVIELENS_URL replaces the address of the directory.
# Sourced without a name, it takes the caller's $1, where there is one, for the name.

# All in a subshell, so that whoever sources this keeps their shell as it was, whatever happens.
(
    fail() { echo "download_dataset.sh: error: $1" >&2; exit 1; }

    name=${1:-ml-20m}
    case $name in
        ml-20m | ml-1m) zip=$name.zip part=$name.zip.part ;;
        *) fail "unknown data set '$name': known are ml-20m and ml-1m" ;;
    esac
    if [ -e "$zip" ]; then echo "$zip: already here"; exit 0; fi
    command -v curl > /dev/null || fail "curl is not installed"

    base=${MOVIELENS_URL:-https://files.grouplens.org/datasets/movielens}
    case $base in http://*) protocols='=http,https' ;; *) protocols='=https' ;; esac

    # Not curl's --retry: a cut connection is not transient to it, and it drops what a stalled one has got.
    for pause in 1 2 4 8 0; do
        rc=0
        reply=$(curl -fL -# -C - --proto "$protocols" --connect-timeout 30 --speed-limit 1 --speed-time 60 \
            -D - -w '%{http_code}' -o "$part" "$base/$zip") || rc=$?
        case $rc/${reply##*[!0-9]} in
            */416) # nothing lies beyond the part: it is whole, or no part of this file; curls differ on rc
                size=$(($(wc -c < "$part")))
                case $reply in *"bytes */$size"*) rc=0; break ;; *) rm -f "$part"; rc=33 ;; esac ;;
            33/*) rm -f "$part" ;; # the server cannot resume
            [567]/* | 1[68]/* | 28/* | 35/* | 5[256]/* | 92/* | 22/408 | 22/429 | 22/5??) # may pass
                sleep "$pause" ;;
            *) break ;;
        esac
    done
    [ "$rc" -eq 0 ] || fail "$base/$zip could not be downloaded"
    mv -f "$part" "$zip" && echo "$zip: downloaded"
)
