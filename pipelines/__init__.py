"""The verbs: prepare, train, evaluate, promote, score, report; one file and one function each."""
