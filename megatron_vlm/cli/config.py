"""Prints the keys of a recipe: what each is, its type, its default, its rules, and whether it may change on a resume.

megatron-vlm config                  the whole tree with its defaults, as YAML
megatron-vlm config parallel         a section, with all that is known of its keys
megatron-vlm config data.packing     one key
megatron-vlm config --markdown       all of it as docs/configuration.md
"""

from megatron_vlm.runtime.command_line import CommandLine


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("key", nargs="?", metavar="KEY", help="a section or a key of the recipe (default: all of them)")
    parser.add_argument("--markdown", action="store_true", help="all keys as a page of the documents")
    with parser.run() as (arguments, _):
        from megatron_vlm.config import reference

        if arguments.markdown and arguments.key:
            parser.error(f"--markdown: found together with {arguments.key!r}, needs one of the two")
        text = reference.markdown() if arguments.markdown else reference.tree()
        if arguments.key:
            text = reference.explain(arguments.key)
        print(text.rstrip("\n"))


if __name__ == "__main__":
    main()
