"""An adapter without its model: merging over files, checking, inspecting, converting."""
