from nlm.cli import main

raise SystemExit(main())
