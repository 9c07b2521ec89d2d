#!/usr/bin/env bash
# Turn a downloaded MovieLens archive in the current directory into a split, in a directory of the same name:
#
#     source extract_dataset.sh [ml-20m|ml-1m]      (or run it; ml-20m unless told)
#
# PYTHON names the interpreter that has the requirements; python3 unless told.
# Sourced without a name, it takes the caller's $1, where there is one, for the name.

# All in a subshell, so that whoever sources this keeps their shell as it was, whatever happens.
(
    fail() { echo "extract_dataset.sh: error: $1" >&2; exit 1; }

    name=${1:-ml-20m}
    case $name in
        ml-20m) ratings=ratings.csv movies=movies.csv ;;
        ml-1m) ratings=ratings.dat movies=movies.dat ;;
        *) fail "unknown data set '$name': known are ml-20m and ml-1m" ;;
    esac
    [ -f "$name.zip" ] || fail "$name.zip is not in this directory: download_dataset.sh $name fetches it"
    python=${PYTHON:-python3}
    here=$(dirname -- "${BASH_SOURCE[0]:-$0}") # zsh has only the latter

    # Copies members' bytes to names of ours, so that no name in the archive becomes a path, and no more of them than
    # it says, where there is room for these. Movies may be missing.
    unpack='
import shutil, signal, sys, zipfile
signal.signal(signal.SIGINT, signal.SIG_DFL)
archive, directory, target, ratings, movies = sys.argv[1:]
member = f"{directory}/{ratings}"
try:
    with zipfile.ZipFile(archive) as file:
        for name in (ratings, movies):
            member = f"{directory}/{name}"
            if name == movies and member not in file.namelist():
                continue
            with file.open(member) as source, open(f"{target}/{name}", "xb") as out:
                size, free = file.getinfo(member).file_size, shutil.disk_usage(".").free
                if size > free:
                    raise OSError(f"it has {size} bytes, and {free} are free")
                shutil.copyfileobj(source, out, 1 << 20)
except Exception as error:
    sys.exit(f"extract_dataset.sh: error: {archive}: cannot unpack {member}: {error}")
'
    tmp= # the caller may have one, which must not be what the trap removes
    trap 'rm -rf "$tmp"; exit 130' INT TERM HUP # zsh runs no EXIT trap on these
    tmp=$(mktemp -d "./$name.XXXXXX") || exit 1 # not in /tmp, which may be small, or memory
    rc=0
    "$python" -c "$unpack" "$name.zip" "$name" "$tmp" "$ratings" "$movies" &&
        "$python" "$here/convert.py" "$tmp/$ratings" "$name" --negatives 999 || rc=$?
    rm -rf "$tmp"
    exit "$rc"
)
