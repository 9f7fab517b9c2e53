"""Where text comes from: local files, wikis, hub datasets, the installed documentation, as one stream of documents."""
